"""The code maps that the encoder chooses from, one per row.

`scripts/find_pool.py` found them and says how; the first is the best affine map for Gaussian weights.
"""

# (M, Z): byte b stands for the 15-bit code (b*M + Z) mod 2^32 >> 17
POOL: tuple[tuple[int, int], ...] = (
    (15853988, 162772864),
    (1608624434, 3210067701),
    (15849322, 181062540),
    (15851647, 70016591),
    (15853815, 145087871),
    (15853156, 228442331),
    (15849852, 98371324),
    (15855944, 85352792),
    (15846784, 131802582),
    (15729776, 137203147),
    (15847160, 163161670),
    (15855666, 195916783),
    (15849909, 224332150),
    (15856880, 96665806),
    (15857181, 207788249),
    (15856933, 227948788),
)
