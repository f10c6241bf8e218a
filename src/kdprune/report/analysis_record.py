"""The part of results.json on the layers' states: how alike they are, and their massive tokens."""

from pydantic import Field, model_validator

from kdprune.report.records import Matrix, Number, Numbers, Record


class Analysis(Record):
    """Similarity of layer states over the calibration tokens (lists over layers l = 0 … L−1)."""

    relative_update: Numbers = Field(description="[L] mean of ‖h_{l+1} − h_l‖ / ‖h_l‖ over tokens")
    cosine: Numbers = Field(description="[L] mean cosine of h_l and h_{l+1} over tokens")
    linear_cka: Numbers = Field(description="[L] linear CKA of h_l and h_{l+1}")
    rbf_cka: Numbers = Field(description="[L] CKA of h_l and h_{l+1} with an RBF kernel (median heuristic)")
    pair_cosine: Matrix = Field(description="[L+1, L+1] mean cosine of h_s and h_e; null where not measured")
    pair_linear_cka: Matrix = Field(description="[L+1, L+1] linear CKA of h_s and h_e")
    pair_rbf_cka: Matrix = Field(description="[L+1, L+1] RBF CKA of h_s and h_e")
    pair_damage: Matrix = Field(
        default_factory=list, description="[L+1, L+1] nats a token, KL(dense‖pruned) with a closed-form stand-in for "
        "[s, e), held-out rows; null where not measured; empty where blocks were not ranked by it")
    state_norm: Numbers = Field(default_factory=list, description="[L+1] mean ‖h_l‖ over tokens")
    tokens: int = Field(description="tokens the statistics were taken over")
    left_out: int = Field(0, description="tokens left out of these statistics, massive at some boundary")
    largest_norm: Numbers = Field(default_factory=list, description="[L+1] largest ‖h_l‖, of all tokens")
    median_norm: Numbers = Field(default_factory=list, description="[L+1] median ‖h_l‖, of all tokens")
    massive_above: Number = Field(
        None, description="a token is massive where ‖h_l‖ is above this many times the median; null: not looked for")
    massive_share: Numbers = Field(default_factory=list, description="[L+1] share of tokens that are massive at h_l")
    massive_move: Numbers = Field(
        default_factory=list, description="[L] root mean square of ‖h_{l+1} − h_l‖ of the tokens that are massive at "
        "some boundary, over that of the others; 0 without such tokens")
    writes: list[int] = Field(default_factory=list, description="layers that write massive tokens")
    erases: list[int] = Field(default_factory=list, description="layers that erase massive tokens")
    protected: tuple[int, int] = Field(
        (0, 0), description="how many layers at the start and at the end are never pruned"
    )

    @model_validator(mode="after")
    def _shapes(self) -> "Analysis":
        """Refuse lists that do not fit together."""
        layers = len(self.relative_update)
        for name in ("cosine", "linear_cka", "rbf_cka"):
            if len(getattr(self, name)) != layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, relative_update {layers}")
        damage = ["pair_damage"] if self.pair_damage else []
        for name in ("pair_cosine", "pair_linear_cka", "pair_rbf_cka", *damage):
            matrix = getattr(self, name)
            if len(matrix) != layers + 1 or any(len(row) != layers + 1 for row in matrix):
                raise ValueError(f"{name} must be {layers + 1} x {layers + 1}")
        boundaries = ("state_norm", "largest_norm", "median_norm", "massive_share")
        for name, count in (*((name, layers + 1) for name in boundaries), ("massive_move", layers)):
            if (found := len(getattr(self, name))) not in (0, count):
                raise ValueError(f"{name} has {found} entries, expected {count}")
        return self

    @property
    def block_damage(self) -> dict[tuple[int, int], float]:
        """``pair_damage`` by block [s, e), of those that were measured."""
        return {(start, end): value for start, row in enumerate(self.pair_damage) for end, value in enumerate(row)
                if value is not None}
