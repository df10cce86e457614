"""Optional parts, a file each; only `app` imports them."""
