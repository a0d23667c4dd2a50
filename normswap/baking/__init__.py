"""Plain layers in place of SN layers whose gates are decided."""
