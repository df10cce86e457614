"""The commands of `control-plane` but `serve`: one file each."""
