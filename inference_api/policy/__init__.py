"""Who may ask, how much, and with which prompts: one document, compiled into one immutable Policy."""
