"""What a router has to know and to hold: most loads need one model on one backend, some need many of something."""

import resource
from dataclasses import dataclass

_LOOPBACK = 127 << 24


@dataclass(frozen=True, slots=True)
class Setup:
    """What a candidate is started with."""

    models: int = 1
    """Names in the catalogue; only the one that the load asks for has backends, and those that were `asked`."""
    backends: int = 1
    """Of that model; all of them are the one engine, which listens on as many addresses."""
    streams: int = 0
    """How many requests are open at once, if that is beyond what routers take by default."""
    asked: int = 1
    """Models that were asked for before the load, so that the metrics have series of each."""
    settings: tuple[tuple[str, str], ...] = ()
    """Further settings of `ours`, in process."""
    keys: str = ""
    """JSON: keys for the entries of its models; of `ours`, in process."""
    further: str = ""
    """JSON: entries beside them; of `ours`, in process."""

    @property
    def label(self) -> str:
        """For file names."""
        return (
            f"{self.models}-{self.backends}-{self.streams}-{self.asked}{'-more' if self.keys or self.further else ''}"
        )

    def origins(self, port: int) -> list[str]:
        return [f"{host}:{port}" for host in loopback(self.backends)]

    def other_names(self) -> list[str]:
        """Of the models besides the one that the load asks for."""
        return [f"org/model-{number}" for number in range(self.models - 1)]

    def asked_names(self) -> list[str]:
        """Of those among them that are to be asked."""
        return self.other_names()[: self.asked - 1]


ONE_OF_EACH = Setup()


def loopback(count: int) -> list[str]:
    """So many addresses of this machine, from 127.0.0.1 on: on Linux all of 127.0.0.0/8 are its own."""
    return [".".join(str(byte) for byte in (_LOOPBACK + n).to_bytes(4)) for n in range(1, count + 1)]


def allow_files(count: int) -> None:
    """Let this process and its children open so many files, as far as the machine lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
