"""RFD4 Proteina: residues and pairs of residues; triangle updates, pair biases in attention, recycling."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Integers, Mask, Normal, Values

MARKS = {f"condition_{kind}_1_atom": Integers((2, 64, 37), 4)
         for kind in ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord", "hotspot")}
PAIRS = {name: Integers((2, 64, 64), high)
         for name, high in dict(bond_mask=2, bond_order=5, is_aromatic=2, na_ss_pair=2, na_ss_pair_mask=2,
                                canonical_polymer_ordering=2, token_bond_path_length=20).items()}

ENTRIES = {
    "rfd4-proteina": Entry(
        cls="RFD4ProteinaTransformer",
        tiny=dict(nlayers=4, token_dim=64, nheads=4, dim_cond=32, pair_repr_dim=16, latent_dim=8,
                  token_type_emb_dim=8, cath_emb_dim=8, t_emb_dim=32, seq_sep_dim=16, xt_pair_dist_dim=10,
                  tri_mult_c=16, recycle_conditioning_dim=3),
        tiny_inputs=dict(  # 64 residues; conditions of every kind but chirality
            bb_ca=Normal((2, 64, 3)), local_latents=Normal((2, 64, 8)),
            bb_ca_time=Values([0.75, 0.25], "float32"), local_latents_time=Values([0.5, 0.125], "float32"),
            padding_mask=Mask(64, (64, 50), "bool"), token_type=Integers((2, 64), 7),
            atom37_mask=Integers((2, 64, 37), 2, dtype="bool"), recycle_depth=2, attention_kwargs=None,
            return_dict=False,
            conditioning={
                "is_in_context_conditioning": Integers((2, 64), 2, dtype="bool"), **MARKS, **PAIRS,
                "supports_local_latent": Integers((2, 64), 2, dtype="bool"), "na_ss_state": Integers((2, 64), 2),
                "na_ss_state_mask": Integers((2, 64), 2), "molecule_iid": Integers((2, 64), 3),
                "molecule_entity_id": Integers((2, 64), 2), "condition_index-group_1_token": Integers((2, 64), 4),
                "condition_secondary-structure_1_residue": Integers((2, 64), 4),
                "condition_cath-label_1_residue": Integers((2, 64, 3), 5, low=-1),
                "condition_coordinate_1_atom": Normal((2, 64, 37, 3)), "element": Integers((2, 64, 37), 20),
                "condition_ChainCentroid_1_atom": Normal((2, 64, 3)), "charge": Integers((2, 64, 37), 3, low=-2),
                "condition_CoordinateGroup_1_atom": Integers((2, 64, 37), 4, low=-1),
                "condition_InternalCoordinate_1_atom": Normal((2, 64, 37, 3)),
                "_prepared_coord_group_seq": Normal((2, 64, 37)),
                "condition_rasa-binned_1_atom": Integers((2, 64, 37), 4)}),
    ),
}
