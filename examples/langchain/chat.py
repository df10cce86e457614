"""LangChain as a client of the router: `pip install langchain-openai`, then `python chat.py [base URL] [model]`."""

import sys

from langchain_openai import ChatOpenAI

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
model = sys.argv[2] if len(sys.argv) > 2 else "llama-3-8b"
chat = ChatOpenAI(base_url=base_url, api_key="unused", model=model)
print(chat.invoke("Hello").content)
for chunk in chat.stream("Count to three."):
    print(chunk.content, end="", flush=True)
print()
