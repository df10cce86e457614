"""The demo: toy engines, a registry and the real router on one machine, without a GPU."""
