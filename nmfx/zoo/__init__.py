"""Models of timm, torchvision and the demo: built by name, recognised again, fed an input that fits."""
