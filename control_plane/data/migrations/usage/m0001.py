"""Create the tables of usage."""

revision = "usage_0001"
down_revision = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
