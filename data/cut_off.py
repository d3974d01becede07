"""Whether an audio file ends before the sound that it promises, from its header and its size alone."""

import re
import struct
from typing import BinaryIO

STREAMED = 0x7FFF0000  # bytes; programs that write to a pipe cannot know the length, and put 0 or at least this
WAV_SLACK = 64  # bytes; some programs count the header
NO_MP3 = re.compile(rb"fLaC|FORM|.{4}ftyp", re.DOTALL)  # flac, aiff and mp4, which may hold the sync bits by chance
FRAME_OF_MP3 = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # sync bits, then MPEG 1, 2 or 2.5, layer III
KILOBITS = (  # per second, by the index in a frame of MPEG 2 and 2.5, and of MPEG 1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest page
END_OF_STREAM = 4  # flag of an ogg page


def shortfall(file: BinaryIO) -> str:
    """What is missing at the end of a wav, ogg or mp3 file; "" if nothing is, or if its header does not tell.

    "" for flac, whose decoder fails where the file ends.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(12)
    if start[:4] in (b"RIFF", b"RF64", b"RIFX") and start[8:] == b"WAVE":
        return _of_wav(file, size)
    if start[:4] == b"OggS":
        return _of_ogg(file, size)
    return _of_mp3(file, size)


def _of_wav(file: BinaryIO, size: int) -> str:
    """A wav file tells the length of its sound, and its own, which counts where the first is a little too large."""
    file.seek(0)
    kind = file.read(4)
    order = ">" if kind == b"RIFX" else "<"
    (whole,) = struct.unpack(order + "I", file.read(4))
    place, long = 12, 0  # long: the length of the sound where 32 bits do not hold it
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack(order + "4sI", file.read(8))
        place += 8
        if name == b"ds64" and length >= 24:
            whole, long = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))
        if name == b"data":
            length = long if kind == b"RF64" and length == 0xFFFFFFFF else length
            slack = WAV_SLACK if whole + 8 <= size else 0
            streamed = length >= STREAMED and not long
            return "" if streamed or size - place + slack >= length else _lacks(size - place, length)
        place += length + length % 2
    return "its header promises sound that is not there"


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
    frame = None if NO_MP3.match(head) else FRAME_OF_MP3.search(head)
    if frame is None:
        return ""
    promised, frames = _promise(head[frame.start() :])
    present = size - place - frame.start()
    if frames and present < promised - promised // frames:
        return _lacks(present, promised)
    return _last_frame(file, place + frame.start(), size)


def _last_frame(file: BinaryIO, place: int, size: int) -> str:
    """Follow the frames to their end: what follows may be a tag, but the last frame must be whole."""
    file.seek(place)
    content, place = file.read(), 0
    while length := _frame_length(content[place : place + 4]):
        if place + length > len(content):
            return f"its last frame has {len(content) - place} of {length} bytes"
        place += length
    left = content[place : place + 4]
    return "its last frame is cut within its header" if 0 < len(left) < 4 and left[0] == 0xFF else ""


def _frame_length(head: bytes) -> int:
    """The bytes of a frame of layer III by its first four; 0 if these begin none, or if its bit rate is free."""
    if len(head) < 4 or not FRAME_OF_MP3.match(head):
        return 0
    version, kilobits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if kilobits in (0, 15) or rate == 3:
        return 0
    first = version == 3  # of MPEG 1; MPEG 2 halves the rate, MPEG 2.5 again
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144_000 if first else 72_000) * KILOBITS[first][kilobits] // hertz + (head[2] >> 1 & 1)


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
