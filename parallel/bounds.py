"""Largest numbers of the configuration: far beyond what anyone trains, and small enough that every
check ends at once and every count, product and date that follows from them is exact.

| bound          | the largest in use                                                         |
|----------------|----------------------------------------------------------------------------|
| LAYERS         | 126 (Llama 3 405B); experiments with 1,000                                  |
| WIDTH          | 53,248 (feed-forward of Llama 3 405B)                                       |
| HEADS, HEAD    | 128 heads; 576 dimensions of a head, 256 of an SSD state                    |
| VOCABULARY     | 262,144 (Gemma 3)                                                           |
| LENGTH         | contexts of 10⁷ tokens (Llama 4 Scout)                                      |
| BATCH          | 16·10⁶ tokens an update: 16,384 sequences of 1,024                          |
| RANKS          | 10⁵ GPUs                                                                    |
| STEPS, TOKENS  | 10⁶ to 10⁷ updates; 4·10¹³ tokens. Products stay below 2⁶³                  |
| SOURCES, STAGES | blends of tens of sources in a handful of stages                           |
| SEED           | of torch's and NumPy's generators                                           |
| SECONDS        | about three years; Python's clocks overflow at 300                          |
"""

LAYERS = 1_024
WIDTH = 1 << 20
HEADS = 1 << 16
HEAD = 1 << 14
VOCABULARY = 1 << 24
LENGTH = 1 << 27
BATCH = 1 << 20
RANKS = 1 << 20
NODES = 1 << 17
RANKS_PER_NODE = 1_024
TRACED_RANKS = 1 << 14  # whose groups --dry-run makes, one by one
STEPS = 10**12
TOKENS = 10**18
COUNT = 10**9  # of things a run meets: shards, bad steps, checkpoints kept
THREADS = 256
SOURCES = 256
STAGES = 256
SEED = (1 << 63) - 1
SECONDS = 1e8
SMALLEST = 1e-37  # a normal float32: less may be 0 in the computation
LARGEST = 1e6  # of factors, rates and weights
