from typing import Any

Format = Any


def get_format(name: str) -> Any:
    return name
