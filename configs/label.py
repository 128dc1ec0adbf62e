"""Labelling of videos: GIM section 3.1.

Arguments, `configs/label.py:NAME`: the paper's presets by the architecture that is to be trained (section 4), its
ablation with RootSIFT alone (row 3 of Table 2: 49.3 of 49.4, the default), or any matchers of `gim-jax models` joined
by `+`, the base first; or `colmap`, its ablation with labels from COLMAP (row 6, extra `sfm`), and `colmap_dense` from
its depth maps (NVIDIA GPU). Networks need weights: `--config.networks.loftr_outdoor.weights=FILE`.

Command: gim-jax label VIDEO [VIDEO ...] --out DIR --config=configs/label.py[:dkm] [--config.every_frames=20]
"""

import ml_collections

PRESETS = {  # section 4: the official outdoor model, and methods weaker than it
    "rootsift": "rootsift",
    "superglue": "superglue_outdoor+rootsift",
    "loftr": "loftr_outdoor+rootsift+superglue_outdoor",
    "colmap": "rootsift",
    "colmap_dense": "rootsift",
    "dkm": "dkm_outdoor+rootsift+superglue_outdoor+loftr_outdoor",
}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    labellers = PRESETS.get(argument or "rootsift", argument).split("+")
    source = argument if argument.startswith("colmap") else "links"
    steps = (1, 2, 4) if source == "links" else (1, 2, 4, 8, 16)  # pairs 20, 40 and 80 frames apart; COLMAP's sequence
    networks = {name: dict(weights="", long_side=0) for name in labellers if name != "rootsift"}  # 0: the model's own
    return ml_collections.ConfigDict(
        dict(
            labellers=tuple(labellers),  # the base first
            networks=networks,
            batch_size=8,  # pairs or frames of a video that pass through a network at once, over all local devices
            every_frames=20,  # section 4: one frame every 20
            every_seconds=0.0,  # used instead where above 0
            max_seconds=0.0,  # label the beginning of a video only; 0: all of it
            long_side=0,  # px; larger frames are made smaller first; 0: never
            mask_provider="",  # module:function or a folder of masks, see data_prep/masks.py; "" for none
            base_steps=steps,
            ratio=0.8,  # gim/video_preprocessor.py
            probes=8,  # cells of the other frame that a RootSIFT descriptor is compared with; 0: all, six times as slow
            max_keypoints=0,  # of RootSIFT; 0: one per 64 pixels
            contrast_threshold=1e-5,  # gim/video_preprocessor.py
            max_diameter_px=8.0,  # 7 % of the labels, with five times the share of errors above 2 px (rendered towns)
            threshold_size=(640, 480),  # where diameters, thresholds and motions in px hold; larger frames scale them
            threshold_px=0.7,  # of robust fitting; gim/video_preprocessor.py has 0.5 px of the matcher's frame
            confidence=0.999999,  # gim/video_preprocessor.py
            max_iters=10_000,
            min_agreement=0.4,  # of labels that look more alike than the places around; by chance 0.11
            thin_px=0.5,  # of two labellers' labels closer than this in either frame the more confident one stays
            source=source,  # of distant labels: "links", propagation; "colmap" or "colmap_dense", reconstruction
            clip_samples=200,  # of a reconstructed clip: 4000 frames
            link_radius_px=1.0,  # section 3.1; pixels of the video; 0: nothing is propagated
            link_rule="paper",  # or "released" (the same rounded pixel) or "local" (more links), data_prep/propagate.py
            min_matches=1024,  # section 3.1, at the size below
            min_matches_size=(1920, 1080),
            scale_min_matches=True,  # with the image area; False: the number holds at every size
            min_motion_px=2.0,  # median shift below which a pair is not saved: nothing to learn from a still camera
            refit_px=0.5,  # again after propagation, as gim/datasets/walk/propagate.py; the paper is silent; 0: not.
            # Rendered town, 160 frames apart: of 0.7 px's labels 95 % stay, 97.2 instead of 96.7 % of them within 2 px
            jpeg_quality=95,
            licence="unknown",  # stored in every record
            workers=0,  # threads; 0: one per core
        )
    )
