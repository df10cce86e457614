"""Where limits are counted: in this process, or together with other routers in Redis."""
