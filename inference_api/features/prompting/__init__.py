"""Stored prompts in requests: what a body asks for, and the edits that put the prompt into it."""
