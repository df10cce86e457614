#!/usr/bin/env python3
"""Writes the next migration of the control plane, from the difference between its tables and its history.

    .venv/bin/python scripts/migration.py main "add the column x to keys"

Read and correct what it writes: a migration only adds, and must run on SQLite and on PostgreSQL.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from alembic.autogenerate import produce_migrations, render_python_code
from sqlalchemy import create_engine

from control_plane.data import schema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=schema.PARTS)
    parser.add_argument("message", help="what the migration does, in a few words")
    arguments = parser.parse_args()
    print(write(arguments.part, arguments.message))


def write(part: schema.Part, message: str) -> Path:
    """The file of the migration, written."""
    head = schema.scripts(part).get_current_head()
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{folder}/empty.sqlite3")
        with engine.connect() as connection:
            if head is not None:
                schema._upgrade(connection, part, "head", schema.MIGRATIONS)
            found = produce_migrations(schema.context(connection, part), schema.METADATA[part])
        engine.dispose()
    assert found.upgrade_ops is not None
    assert found.downgrade_ops is not None
    number = f"{len(list(schema.scripts(part).walk_revisions())) + 1:04d}"
    revision = f"{part}_{number}"
    path = Path(schema.__file__).with_name("migrations") / part / f"m{number}.py"
    up, down = (
        render_python_code(ops, render_as_batch=True, migration_context=None)
        for ops in (found.upgrade_ops, found.downgrade_ops)
    )
    up, down = (code.replace("astext_type=Text()", "astext_type=sa.Text()") for code in (up, down))
    up, down = (re.sub(r"\n? *# ###.*", "", code).strip() for code in (up, down))
    text = f'"""{message[0].upper()}{message[1:]}."""\n\nimport sqlalchemy as sa\nfrom alembic import op\n'
    if "postgresql." in up + down:
        text += "from sqlalchemy.dialects import postgresql\n"
    text += f"\nrevision = {revision!r}\ndown_revision = {head!r}\n\n\ndef upgrade() -> None:\n    {up}\n\n\n"
    path.write_text(f"{text}def downgrade() -> None:\n    {down}\n")
    subprocess.run([Path(sys.executable).with_name("ruff"), "format", "-q", path], check=True)
    return path


if __name__ == "__main__":
    main()
