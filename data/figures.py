"""Figures as people read them, on pages and in the terminal."""


def counted(number: int, noun: str) -> str:
    """1 document, 2 documents, 1,200 documents."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """0.21 s, 12.3 s, 2 min 43 s, 3 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def memory(num_bytes: float) -> str:
    """0.9 KiB, 1.0 GiB."""
    units = ["KiB", "MiB", "GiB", "TiB"]
    num_bytes /= 1024
    while num_bytes >= 1023.95 and len(units) > 1:
        num_bytes, units = num_bytes / 1024, units[1:]
    return f"{num_bytes:,.1f} {units[0]}"


def number(value: float) -> str:
    """660,272; four figures of what is not whole: 2.129, 1,234."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
