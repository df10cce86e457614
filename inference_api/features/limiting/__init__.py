"""The rules of limits: windows, amounts, whose limits apply, and the words of a refusal. Pure: no input or output."""
