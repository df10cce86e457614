"""The history of the schema: `main` and `usage`, one file a step."""
