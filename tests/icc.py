"""ICC profiles for tests: small, and made here."""

import struct

from PIL import ImageCms

# Columns of Display P3's matrix, adapted to D50.
P3_COLORANTS = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def p3_profile() -> bytes:
    """sRGB's tone curve with the primaries of Display P3."""
    profile = bytearray(srgb_profile())
    for place in range(132, 132 + 12 * struct.unpack_from(">I", profile, 128)[0], 12):
        name, start, _ = struct.unpack_from(">4sII", profile, place)
        if name in P3_COLORANTS:
            struct.pack_into(">3i", profile, start + 8, *(round(65536 * value) for value in P3_COLORANTS[name]))
    return bytes(profile)


def cmyk_profile(ink_lab: tuple[int, int, int]) -> bytes:
    """A printer with white paper, black ink K, and three inks that print one and the same colour.

    Args:
        ink_lab: that colour in Lab, each value in 0..255: L x 2.55, a + 128, b + 128.
    """
    corners = [(255, 128, 128), (0, 128, 128), *[ink_lab, (0, 128, 128)] * 7]  # C, M, Y, K in 2 steps each, K fastest
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 if place % 4 == 0 else 0 for place in range(9)))
    table += ramp * 4 + b"".join(map(bytes, corners)) + ramp * 3
    start = 128 + 4 + 12
    head = struct.pack(">I4sI4s4s4s", start + len(table), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", start, len(table)) + table


def grey_profile(gamma: float) -> bytes:
    """Grey with a tone curve of a power."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    start = 128 + 4 + 24
    head = struct.pack(">I4sI4s4s4s", start + len(curve) + len(white), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    tags = struct.pack(">I4sII", 2, b"kTRC", start, len(curve))
    tags += struct.pack(">4sII", b"wtpt", start + len(curve), len(white))
    return head.ljust(128, b"\0") + tags + curve + white
