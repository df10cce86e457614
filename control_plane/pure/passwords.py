"""Which passwords are refused: short ones, and those that are tried first. No rules of composition."""

SHORTEST, LONGEST = 12, 1000
_FEWEST_CHARACTERS = 5
# What people choose when they need twelve characters
_COMMON = """
123456789012 1234567890123 12345678901234 123456789012345 1234567890123456 012345678901 0123456789ab
1234567890ab 123456123456 1q2w3e4r5t6y 1qaz2wsx3edc 1qaz2wsx3edc4rfv qwertyuiop12 qwertyuiop123 qwertyuiopas
qwertyuiopasdf qwertyuiop[] qwerty123456 qwertyqwerty qwerty1234567 asdfghjkl123 asdfghjklzxc zxcvbnm12345
abcdefghijkl abcdefghijklmnop abcdef123456 abcd12345678 abc123abc123 password1234 password12345 password123456
password2024 password2025 password2026 password2027 passwordpassword passw0rd1234 passw0rd12345 p@ssw0rd1234
p@ssword1234 mypassword12 mypassword123 letmeinletmein letmein12345 letmein123456 iloveyou1234 iloveyouiloveyou
welcome12345 welcome123456 administrator administrator1 adminadminadmin admin1234567 admin12345678
admin123456789 changeme1234 changemechangeme changeit1234 defaultpassword secretsecret supersecret1
supersecret123 correcthorsebatterystaple monkeymonkey dragondragon footballfootball baseballbaseball
superman1234 sunshine1234 princess1234 trustno1trustno1 controlplane control-plane inference-api inferenceapi
"""
_REFUSED = frozenset(_COMMON.split())


def weakness(password: str, *names: str | None) -> str | None:
    """Why a password is refused; None: it may be used. `names`: of its owner, which it may not be."""
    if len(password) < SHORTEST:
        return f"must have at least {SHORTEST} characters"
    if len(password) > LONGEST:
        return f"must have at most {LONGEST} characters"
    plain = password.casefold()
    if plain in _REFUSED or len(set(plain)) < _FEWEST_CHARACTERS:
        return "is one of those that are tried first; choose another"
    if any(name and plain in (name.casefold(), name.casefold() * 2) for name in names):
        return "must not be a name or an e-mail address of its owner"
    return None
