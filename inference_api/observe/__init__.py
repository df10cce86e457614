"""What every request leaves behind: metrics and one log line."""
