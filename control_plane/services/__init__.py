"""What can be done with the data: one transaction each, with its audit row in it."""
