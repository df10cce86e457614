"""Audio and images: /v1/audio/transcriptions and translations, /v1/audio/speech, /v1/images/generations."""

import base64
import hashlib
import io
import struct
import wave
import zlib
from typing import Any

from starlette.responses import Response

from inference_api.demo import model
from inference_api.demo.chat import Choices
from inference_api.demo.pooling import Card
from inference_api.demo.requests import Draw, Speak, Transcribe

_RATE = 8000
# Of 16-bit sound at 16 kHz, whatever it is really.
_BYTES_A_SECOND = 32000


class Transcription(Choices):
    """It says how long the audio is, not what is in it."""

    prefix, chunk_kind = "trsc", "transcription.chunk"

    def document(self) -> dict[str, Any] | str:
        asked, text = self.work.asked, self.work.generations[0].text
        assert isinstance(asked, Transcribe)
        seconds = -(-asked.size // _BYTES_A_SECOND)
        end = float(seconds)
        segments = [{"id": 0, "start": 0.0, "end": end, "text": text}]
        forms: dict[str, dict[str, Any] | str] = {
            "text": text,
            "json": {"text": text, "usage": {"type": "duration", "seconds": seconds}},
            "verbose_json": {"text": text, "language": asked.language, "duration": end, "segments": segments},
        }
        return forms[asked.format]


def speech(asked: Speak, card: Card) -> Response:
    """A tenth of a second of silence for each token."""
    samples = bytes(2 * _RATE // 10 * len(model.tokenize(asked.input)))
    if asked.response_format == "pcm":
        return Response(samples, media_type="audio/pcm")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, _RATE, 0, "NONE", ""))
        sound.writeframes(samples)
    return Response(file.getvalue(), media_type="audio/wav")


def images(asked: Draw, card: Card) -> dict[str, Any]:
    """One colour for each prompt and image."""
    width, height = map(int, asked.size.split("x"))
    pictures = [_png(width, height, f"{asked.prompt}{number}") for number in range(asked.n)]
    data = [{"b64_json": base64.b64encode(picture).decode()} for picture in pictures]
    return {"created": card.created, "data": data, "output_format": "png"}


def _png(width: int, height: int, text: str) -> bytes:
    colour = hashlib.sha256(text.encode()).digest()[:3]
    pixels = zlib.compress((b"\0" + colour * width) * height)
    chunks = ((b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
