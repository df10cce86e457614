"""The pages of the console: one module for each, which renders what services say and sends forms to them."""
