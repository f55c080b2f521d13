"""Settings of an index."""

from dataclasses import dataclass

from twoview.errors import require

KINDS = ("exact", "hnsw", "ivfpq")
EXACT_UP_TO = 200_000  # vectors that "auto" searches exactly
HNSW_UP_TO = 5_000_000  # vectors for which "auto" builds a graph; above, codes of vectors take less memory
IVFPQ_FROM = 1000  # vectors that the codes of IVF-PQ need to be learned from


@dataclass(frozen=True)
class IndexSettings:
    """How the vectors of an index are searched.

    Args:
        kind: "exact" compares a query with all vectors. "hnsw" follows the links of a graph (HNSW, Malkov & Yashunin
            2016, arXiv:1603.09320) and "ivfpq" compares the codes of the vectors in the nearest of many lists
            (IVF-PQ, Jégou et al. 2011, doi:10.1109/TPAMI.2010.57); both need faiss and may miss neighbors. "auto" is
            "exact" up to 200,000 vectors or without faiss, "hnsw" up to 5 million vectors, and "ivfpq" above.
        half: whether vectors are stored in fp16, which takes half of the space; similarities change by about 1e-3.
        recall: recall@10 against exact search, in (0, 1], that "hnsw" and "ivfpq" shall reach; more of the graph, or
            more lists, are searched for a larger value.
        links: links of each vector in the graph of "hnsw" (M in the paper), 4 to 128; more take more memory and time.
        construction: vectors that are considered for these links (efConstruction in the paper), at least ``links``.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> IndexSettings(kind="exact").resolved(10**6)
        'exact'
    """

    kind: str = "auto"
    half: bool = False
    recall: float = 0.95
    links: int = 32
    construction: int = 64

    def __post_init__(self) -> None:
        require(self.kind in ("auto", *KINDS), f"kind={self.kind}: choose one of auto, {', '.join(KINDS)}")
        require(isinstance(self.half, bool), f"half={self.half}: give true or false")
        known = isinstance(self.recall, int | float) and 0 < self.recall <= 1
        require(known, f"recall={self.recall}: give a share above 0 and up to 1")
        known = isinstance(self.links, int) and 4 <= self.links <= 128
        require(known, f"links={self.links}: give a whole number from 4 to 128")
        known = isinstance(self.construction, int) and self.links <= self.construction <= 4096
        require(known, f"construction={self.construction}: give a whole number from links={self.links} to 4096")

    def resolved(self, vectors: int, faiss: bool = True) -> str:
        """Return the kind of an index of so many vectors; "exact" for those that are too few for "ivfpq".

        Args:
            vectors: number of vectors.
            faiss: whether faiss is installed.
        """
        if self.kind == "ivfpq":
            return "ivfpq" if vectors >= IVFPQ_FROM else "exact"
        if self.kind != "auto":
            return self.kind
        if vectors <= EXACT_UP_TO or not faiss:
            return "exact"
        return "hnsw" if vectors <= HNSW_UP_TO else "ivfpq"
