"""From a Call to a relayed Reply: attempts, header hygiene, transport, relay."""
