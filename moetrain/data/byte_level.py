"""The byte-level alphabet: the visible character that stands for each byte in a byte-level vocabulary."""


def byte_characters() -> dict[str, int]:
    """Return the byte of each character of the alphabet (`bytes_to_unicode` of GPT-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = byte_characters()
"""Byte of each character."""
CHARACTERS = {byte: character for character, byte in BYTES.items()}
"""Character of each byte."""
