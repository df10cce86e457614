"""What features share that let several models work for one request at once."""
