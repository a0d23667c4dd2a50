"""SN layers and the conversion inside other libraries: one file a library, each imported only by those who use it."""
