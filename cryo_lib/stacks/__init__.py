"""What lies on disk in the field's formats."""
