"""The demo: fake engines, a registry and the real router on one machine, without a GPU."""
