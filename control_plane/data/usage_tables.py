"""The tables of usage: in a file of their own on SQLite, so that a full or torn one does not stop the catalogue."""

from sqlalchemy import MetaData

from control_plane.data.tables import CONVENTION

metadata = MetaData(naming_convention=CONVENTION)
