"""Bytes on disk: written whole or not at all, parsed at the door into typed values; knows no model."""
