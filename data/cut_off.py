"""Whether an audio file ends before the sound that it promises, from its header and its size alone."""

import re
import struct
from typing import BinaryIO

STREAMED = 0x7FFF0000  # bytes; programs that write to a pipe cannot know the length, and put 0 or at least this
WAV_SLACK = 64  # bytes; some programs count the header
FRAME_OF_MP3 = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # sync bits, then MPEG 1, 2 or 2.5, layer III
OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest page
END_OF_STREAM = 4  # flag of an ogg page


def shortfall(file: BinaryIO) -> str:
    """What is missing at the end of a wav, ogg or mp3 file; "" if nothing is, or if its header does not tell."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"WAVE":
        return _of_wav(file, size)
    if start[:4] == b"OggS":
        return _of_ogg(file, size)
    return _of_mp3(file, size)


def _of_wav(file: BinaryIO, size: int) -> str:
    place = 12
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        place += 8
        if name == b"data":
            present = size - place
            return _lacks(present, length) if present + WAV_SLACK < length < STREAMED else ""
        place += length + length % 2
    return ""


def _of_ogg(file: BinaryIO, size: int) -> str:
    """Ogg marks its last page; what follows that page, such as a tag, does not count."""
    file.seek(max(0, size - 2 * OGG_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS\0") :]
    whole = len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return "" if whole and page[5] & END_OF_STREAM else "its last page is not marked as the end"


def _of_mp3(file: BinaryIO, size: int) -> str:
    """A Xing, Info or VBRI header, in the first frame, holds the number of bytes; a file without one does not tell."""
    file.seek(0)
    start = file.read(10)
    place = 0
    if start[:3] == b"ID3":  # a length of four times seven bits
        place = 10 + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=False))
    file.seek(place)
    head = file.read(8192)
    frame = FRAME_OF_MP3.search(head)
    if frame is None:
        return ""
    promised, frames = _promise(head[frame.start() :])
    present = size - place - frame.start()
    return _lacks(present, promised) if frames and present < promised - promised // frames else ""


def _promise(frame: bytes) -> tuple[int, int]:
    """The bytes and the frames that the first frame of an mp3 file promises; zeros if it promises none."""
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return struct.unpack(">II", frame[46:54])
    for place in (36, 21, 13):  # by the channels and the version of MPEG
        if frame[place : place + 4] in (b"Xing", b"Info") and len(frame) >= place + 16:
            flags, frames, length = struct.unpack(">III", frame[place + 4 : place + 16])
            return (length, frames) if flags & 3 == 3 else (0, 0)
    return 0, 0


def _lacks(present: int, promised: int) -> str:
    return f"{present} of the {promised} bytes of sound that its header promises"
