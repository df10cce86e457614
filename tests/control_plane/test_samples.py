"""Code that is shown to be copied asks for just what it was made of, whatever characters that has."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from control_plane.pure.chat import Question, Turn
from control_plane.pure.samples import codes

ODD = """'it' "is" `x` $(x) $HOME ${x} \\n \\ %s
EOF
</script> \u2028 \x00 \x85 Straße 钥匙"""
# In the place of curl and of the SDKs: each prints the address, and then the body that it was called with.
CURL = "#!/bin/sh\nprintf '%s\\n' \"$2\"\ncat\n"
PYTHON = """
import json

class OpenAI:
    def __init__(self, base_url, api_key):
        self.base_url, self.chat, self.completions = base_url, self, self

    def create(self, extra_body, **body):
        print(self.base_url + "/chat/completions")
        print(json.dumps({**body, **extra_body}))
        return []
"""
JAVASCRIPT = """
export default class {
  constructor({ baseURL }) {
    const create = async (body) => {
      console.log(`${baseURL}/chat/completions`);
      console.log(JSON.stringify(body));
      return [];
    };
    this.chat = { completions: { create } };
  }
}
"""


def ran(folder: Path, name: str, text: str) -> str:
    """What the code prints."""
    command = {
        "curl": ["bash", "code"],
        "Python": [sys.executable, "code"],
        "JavaScript": ["node", "code.mjs"],
    }[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not there")
    stand_ins: Mapping[str, str] = {
        "curl": CURL,
        "openai.py": PYTHON,
        "node_modules/openai/index.js": JAVASCRIPT,
        "node_modules/openai/package.json": '{"type": "module", "main": "index.js"}',
        command[1]: text,
    }
    for path, content in stand_ins.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    (folder / "curl").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "INFERENCE_API_KEY": "k", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("name", ["curl", "Python", "JavaScript"])
def test_code_asks_for_just_what_it_was_made_of(tmp_path: Path, name: str) -> None:
    prompt = {"id": "p", "version": 3, "variables": {"x": ODD}}
    question = Question((Turn("system", ODD), Turn("user", "Hi")), prompt, {"temperature": 0.5, "stop": [ODD]})
    code = next(one.text for one in codes(question, ODD, 'https://router/it\'s-"$(x)"') if one.name == name)

    address, _, body = ran(tmp_path, name, code).partition("\n")

    assert address == 'https://router/it\'s-"$(x)"/v1/chat/completions'
    assert json.loads(body) == {**question.body(ODD), "stream": True}
