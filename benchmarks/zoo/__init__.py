"""Convert and verify every model of timm, torchvision and transformers."""
