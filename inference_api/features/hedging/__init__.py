"""When a second attempt pays, and how many there may be. Pure."""
