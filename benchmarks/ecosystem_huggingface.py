"""Hugging Face vision models from small configurations of their own classes; nothing is downloaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
import transformers.modeling_utils  # else every process would load it anew
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]

TOKENS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
"""Of a transformer of one width."""

VIT = {"image_size": 64, "patch_size": 16, **TOKENS}

STAGES = {
    "num_encoder_blocks": 4,
    "depths": [1, 1, 1, 1],
    "sr_ratios": [4, 2, 2, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
}
"""Of a pyramid of transformers."""

QUERIES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
}
"""Of DETR and its kind."""

ALL = ["stage1", "stage2", "stage3", "stage4"]
"""The stages of a backbone whose outputs are used."""

PYRAMID_SWIN = {"image_size": 128, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4], "out_features": ALL}

HYBRID = {
    "encoder_hidden_dim": 32,
    "d_model": 32,
    "encoder_in_channels": [24, 32, 40],
    "decoder_in_channels": [32, 32, 32],
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
    "num_denoising": 0,
}
"""Of RT-DETR and its kind."""


def config(name: str, **options: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**options)


def made(cls: str, configuration: Any, *shape: int) -> Made:
    """A model and its example inputs: one image of 3 × 64 × 64, or of the shape given."""
    model = getattr(transformers, cls)(configuration)
    return model, {"pixel_values": torch.randn(1, *(shape or (3, 64, 64)))}


def classifier(name: str, *shape: int, **options: Any) -> Callable[[], Made]:
    return lambda: made(f"{name}ForImageClassification", config(name, num_labels=5, **options), *shape)


def resnet(**options: Any) -> Any:
    return config(
        "ResNet",
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        **options,
    )


def rt_resnet() -> Any:
    return config(
        "RTDetrResNet",
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def hgnet(**options: Any) -> Any:
    return config(
        "HGNetV2",
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"],
        **options,
    )


def swin(name: str = "Swin", **options: Any) -> Any:
    sizes = {"embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 4], "window_size": 4}
    return config(name, **{"image_size": 64, **sizes, **options})


def dinov2(**options: Any) -> Any:
    return config(
        "Dinov2", image_size=64, patch_size=16, mlp_ratio=2, **(TOKENS | {"num_hidden_layers": 4}), **options
    )


def detr(name: str, **options: Any) -> Callable[[], Made]:
    backbone = lambda: resnet(out_features=["stage4"])  # noqa: E731
    return lambda: made(
        f"{name}ForObjectDetection", config(name, backbone_config=backbone(), **QUERIES, **options)
    )


def deformable_detr() -> Made:
    backbone = resnet(out_features=["stage2", "stage3", "stage4"])
    options = QUERIES | {"num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2}
    return made(
        "DeformableDetrForObjectDetection", config("DeformableDetr", backbone_config=backbone, **options)
    )


def dab_detr() -> Made:
    options = {k: v for k, v in QUERIES.items() if k != "d_model"}
    backbone = resnet(out_features=["stage4"])
    return made(
        "DabDetrForObjectDetection", config("DabDetr", backbone_config=backbone, hidden_size=32, **options)
    )


def mask2former() -> Made:
    backbone = swin(**PYRAMID_SWIN)
    options = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 48,
        "dim_feedforward": 48,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "num_attention_heads": 4,
        "num_queries": 7,
    }
    return made(
        "Mask2FormerForUniversalSegmentation",
        config("Mask2Former", backbone_config=backbone, **options),
        3,
        128,
        128,
    )


def maskformer() -> Made:
    backbone = swin(**PYRAMID_SWIN)
    decoder = config("Detr", backbone_config=resnet(), **QUERIES)
    return made(
        "MaskFormerForInstanceSegmentation",
        config(
            "MaskFormer",
            backbone_config=backbone,
            decoder_config=decoder,
            fpn_feature_size=32,
            mask_feature_size=32,
        ),
        3,
        128,
        128,
    )


def upernet(backbone: Any, auxiliary: int, size: int) -> Made:
    options: dict[str, Any] = {"hidden_size": 24, "auxiliary_channels": 16, "num_labels": 5}
    return made(
        "UperNetForSemanticSegmentation",
        config("UperNet", backbone_config=backbone, auxiliary_in_channels=auxiliary, **options),
        3,
        size,
        size,
    )


def dpt(cls: str) -> Made:
    options = VIT | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
    widths = {"neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16, "num_labels": 5}
    return made(cls, config("DPT", **options, **widths))


def depth_anything() -> Made:
    backbone = dinov2(out_features=ALL, reshape_hidden_states=False)
    widths = {"neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16, "head_hidden_size": 8}
    options = {"backbone_config": backbone, "patch_size": 16, "reassemble_hidden_size": 32}
    return made("DepthAnythingForDepthEstimation", config("DepthAnything", **options, **widths))


def zoedepth() -> Made:
    backbone = config(
        "Beit",
        **VIT | {"num_hidden_layers": 4},
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=ALL,
    )
    widths = {
        "neck_hidden_sizes": [8, 16, 24, 32],
        "fusion_hidden_size": 16,
        "bottleneck_features": 16,
        "num_relative_features": 8,
        "bin_embedding_dim": 16,
        "num_attractors": [4, 2, 2, 1],
    }
    bins = [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}]
    return made(
        "ZoeDepthForDepthEstimation",
        config("ZoeDepth", backbone_config=backbone, bin_configurations=bins, **widths),
    )


def sam(cls: str = "SamModel") -> Made:
    vision = TOKENS | {
        "mlp_dim": 48,
        "output_channels": 16,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
    }
    vision = {k: v for k, v in vision.items() if k != "intermediate_size"} | {
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    }
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 8}
    masks = {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    configuration = config(
        "Sam", vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks
    )
    model, inputs = made(cls, configuration)
    return model, inputs | {"input_points": 64 * torch.rand(1, 1, 2, 2)}


def vitmatte() -> Made:
    backbone = config(
        "VitDet",
        image_size=64,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        num_channels=4,
        window_size=2,
        window_block_indices=[0],
        use_relative_position_embeddings=True,
        out_features=["stage2"],
    )
    widths = {
        "convstream_hidden_sizes": [8, 16, 24],
        "fusion_hidden_sizes": [24, 16, 8, 8],
        "hidden_size": 32,
    }
    return made("VitMatteForImageMatting", config("VitMatte", backbone_config=backbone, **widths), 4, 64, 64)


def vitpose() -> Made:
    options = TOKENS | {
        "image_size": [64, 48],
        "patch_size": [16, 16],
        "mlp_ratio": 2,
        "out_features": ["stage2"],
    }
    options = {k: v for k, v in options.items() if k != "intermediate_size"}
    backbone = config("VitPoseBackbone", **options)
    return made("VitPoseForPoseEstimation", config("VitPose", backbone_config=backbone), 3, 64, 48)


def vit_mae() -> Made:
    decoder = {
        "decoder_num_attention_heads": 2,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 24,
    }
    model, inputs = made("ViTMAEForPreTraining", config("ViTMAE", **VIT, **decoder))
    return model, inputs | {"noise": torch.rand(1, 16)}


def video(name: str, **options: Any) -> Callable[[], Made]:
    return lambda: made(
        f"{name}ForVideoClassification",
        config(name, num_frames=4, num_labels=5, **VIT, **options),
        4,
        3,
        64,
        64,
    )


def levit() -> Made:
    sizes = {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    }
    return made("LevitForImageClassification", config("Levit", image_size=64, num_labels=5, **sizes))


def cvt() -> Made:
    sizes = {
        "embed_dim": [8, 16, 24],
        "num_heads": [1, 2, 3],
        "depth": [1, 2, 3],
        "mlp_ratio": [2.0, 2.0, 2.0],
    }
    return made("CvtForImageClassification", config("Cvt", num_labels=5, **sizes))


def segformer() -> Made:
    configuration = config("Segformer", decoder_hidden_size=16, num_labels=5, **STAGES)
    return made("SegformerForSemanticSegmentation", configuration)


def glpn() -> Made:
    return made("GLPNForDepthEstimation", config("GLPN", decoder_hidden_size=16, **STAGES))


def pvt() -> Made:
    options = {k: v for k, v in STAGES.items() if k != "sr_ratios"}
    return made(
        "PvtForImageClassification",
        config("Pvt", image_size=64, sequence_reduction_ratios=STAGES["sr_ratios"], num_labels=5, **options),
    )


def rt_detr(name: str, backbone: Callable[[], Any], **options: Any) -> Callable[[], Made]:
    return lambda: made(
        f"{name}ForObjectDetection", config(name, backbone_config=backbone(), **HYBRID, **options)
    )


def swin2sr() -> Made:
    options = {
        "image_size": 32,
        "embed_dim": 16,
        "depths": [2],
        "num_heads": [2],
        "window_size": 4,
        "upscale": 2,
    }
    return made("Swin2SRForImageSuperResolution", config("Swin2SR", **options), 3, 32, 32)


def yolos() -> Made:
    options = {**TOKENS, "image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 7}
    return made("YolosForObjectDetection", config("Yolos", **options))


def eomt() -> Made:
    options = VIT | {
        "num_hidden_layers": 3,
        "num_blocks": 1,
        "num_queries": 7,
        "mlp_ratio": 2,
        "num_upscale_blocks": 1,
    }
    options = {k: v for k, v in options.items() if k != "intermediate_size"}
    return made("EomtForUniversalSegmentation", config("Eomt", **options))


def wide(
    sizes: Sequence[int] = (8, 16, 24, 32), depths: Sequence[int] = (1, 1, 1, 1), **options: Any
) -> dict[str, Any]:
    return {"hidden_sizes": list(sizes), "depths": list(depths), **options}


EFFICIENT = {
    "width_coefficient": 0.25,
    "depth_coefficient": 0.5,
    "image_size": 64,
    "hidden_dim": 320,
    "kernel_sizes": [3, 3, 5],
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 2],
    "expand_ratios": [1, 4, 4],
}

MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 20, 24],
    "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40],
    "num_attention_heads": 2,
}

CASES: dict[str, Callable[[], Made]] = {
    "ViT": classifier("ViT", **VIT),
    "DeiT": lambda: made("DeiTForImageClassificationWithTeacher", config("DeiT", **VIT)),
    "BEiT": classifier("Beit", **VIT, use_relative_position_bias=True),
    "Data2Vec vision": classifier("Data2VecVision", **VIT, use_absolute_position_embeddings=True),
    "DINOv2": lambda: made("Dinov2ForImageClassification", dinov2(num_labels=5)),
    "DINOv2 with registers": classifier("Dinov2WithRegisters", mlp_ratio=2, **VIT),
    "DINOv3 ViT": lambda: made("DINOv3ViTModel", config("DINOv3ViT", **VIT)),
    "I-JEPA": classifier("IJepa", **VIT),
    "ViT-MSN": classifier("ViTMSN", **VIT),
    "Hiera": lambda: made(
        "HieraForImageClassification",
        config(
            "Hiera",
            image_size=[64, 64],
            embed_dim=8,
            depths=[1, 1, 1],
            num_heads=[1, 2, 4],
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, True, False],
            num_query_pool=2,
            num_labels=5,
        ),
    ),
    "Swin": lambda: made("SwinForImageClassification", swin(num_labels=5)),
    "Swin v2": lambda: made("Swinv2ForImageClassification", swin("Swinv2", num_labels=5)),
    "PVT": pvt,
    "PVT v2": lambda: made(
        "PvtV2ForImageClassification", config("PvtV2", image_size=64, num_labels=5, **STAGES)
    ),
    "PVT v2 linear": lambda: made(
        "PvtV2ForImageClassification",
        config("PvtV2", image_size=64, num_labels=5, linear_attention=True, **STAGES),
    ),
    "CvT": cvt,
    "LeViT": levit,
    "MobileViT": classifier("MobileViT", **MOBILEVIT),
    "MobileViT v2": classifier("MobileViTV2", image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1]),
    "SwiftFormer": classifier("SwiftFormer", embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], mlp_ratio=2),
    "FocalNet": classifier(
        "FocalNet",
        image_size=64,
        embed_dim=8,
        **wide((16, 24, 32), (1, 1, 1)),
        focal_levels=[2, 2, 2],
        focal_windows=[3, 3, 3],
    ),
    "PoolFormer": classifier("PoolFormer", **wide(), mlp_ratio=2.0),
    "ConvNeXt": classifier("ConvNext", **wide()),
    "ConvNeXt v2": classifier("ConvNextV2", **wide()),
    "DINOv3 ConvNeXt": lambda: made("DINOv3ConvNextModel", config("DINOv3ConvNext", **wide())),
    "ResNet": lambda: made("ResNetForImageClassification", resnet(num_labels=5)),
    "ResNet, bottlenecks": classifier("ResNet", embedding_size=8, **wide((16, 32, 48, 64))),
    "RegNet": classifier("RegNet", embedding_size=8, groups_width=8, **wide((16, 24, 32, 40))),
    "BiT": classifier("Bit", embedding_size=16, num_groups=8, **wide((32, 48, 64, 80))),
    "EfficientNet": classifier("EfficientNet", **EFFICIENT),
    "MobileNet v1": classifier("MobileNetV1", image_size=64, depth_multiplier=0.25),
    "MobileNet v2": classifier("MobileNetV2", image_size=64, depth_multiplier=0.25),
    "HGNet v2": lambda: made("HGNetV2ForImageClassification", hgnet(num_labels=5)),
    "TextNet": classifier(
        "TextNet",
        stem_out_channels=8,
        conv_layer_kernel_sizes=[[[3, 3], [3, 1]], [[3, 3]], [[1, 3], [3, 3]], [[3, 3]]],
        conv_layer_strides=[[1, 2], [2], [1, 2], [2]],
        hidden_sizes=[8, 8, 16, 16, 24],
    ),
    "CLIP vision": lambda: made(
        "CLIPVisionModelWithProjection", config("CLIPVision", projection_dim=16, **VIT)
    ),
    "CLIP classifier": lambda: made(
        "CLIPForImageClassification", config("CLIP", vision_config=VIT, text_config=TOKENS, num_labels=5)
    ),
    "SigLIP vision": lambda: made("SiglipVisionModel", config("SiglipVision", **VIT)),
    "SegFormer": segformer,
    "SegFormer, classification": classifier("Segformer", **STAGES),
    "MobileNet v2, DeepLab v3+": lambda: made(
        "MobileNetV2ForSemanticSegmentation",
        config("MobileNetV2", image_size=64, depth_multiplier=0.25, output_stride=16, num_labels=5),
    ),
    "UPerNet with Swin": lambda: upernet(swin(**PYRAMID_SWIN), 64, 128),
    "UPerNet with ConvNeXt": lambda: upernet(config("ConvNext", **wide(), out_features=ALL), 24, 64),
    "DPT, segmentation": lambda: dpt("DPTForSemanticSegmentation"),
    "DPT, depth": lambda: dpt("DPTForDepthEstimation"),
    "Depth Anything": depth_anything,
    "ZoeDepth": zoedepth,
    "GLPN": glpn,
    "Mask2Former with Swin": mask2former,
    "MaskFormer with Swin": maskformer,
    "EoMT": eomt,
    "DETR": detr("Detr"),
    "Table Transformer": detr("TableTransformer"),
    "Conditional DETR": detr("ConditionalDetr"),
    "Deformable DETR": deformable_detr,
    "DAB-DETR": dab_detr,
    "RT-DETR": rt_detr("RTDetr", rt_resnet),
    "RT-DETR v2": rt_detr("RTDetrV2", rt_resnet),
    "D-FINE": rt_detr("DFine", hgnet),
    "YOLOS": yolos,
    "SAM": sam,
    "ViTMatte": vitmatte,
    "ViTPose": vitpose,
    "ViT-MAE": vit_mae,
    "Swin2SR": swin2sr,
    "TimeSformer": video("Timesformer"),
    "VideoMAE": video("VideoMAE"),
}
"""Name -> makes the model and its example inputs."""


def loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """The training loss of the model's own class, as `Trainer` uses it; None where it takes no class labels."""
    if "ImageClassification" not in type(model).__name__ or "Teacher" in type(model).__name__:
        return None
    result: torch.Tensor = model(
        **inputs, labels=torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)
    ).loss
    return result
