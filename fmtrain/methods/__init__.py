"""DINO and DINOv2 and their pure parts."""
