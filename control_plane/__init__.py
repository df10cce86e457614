"""The control plane: the registry for teams. Stores what routers poll, takes what they push; they never wait for it.

`http` answers, `services` change and read the data in one transaction each, `data` is the database, `pure` decides.
"""
