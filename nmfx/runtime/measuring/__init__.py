"""What takes how long on this machine."""
