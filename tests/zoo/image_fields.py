"""Config fields of convolutional and staged vision models, for :mod:`tests.zoo.fields`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.zoo.configs import Shape


def images(s: Shape) -> dict[str, dict[str, Any]]:
    """Stages of two blocks each, two stages where the class allows it."""
    (w, v), heads = (((12, 20), [2, 4]), ((16, 28), [4, 2]), ((24, 32), [3, 8]))[s.number]
    stages = {"depths": [2, 2], "image_size": 32, "patch_size": 4}
    swin = stages | {"embed_dim": w, "num_heads": heads, "window_size": 4, "num_layers": 2}
    convnext = stages | {"hidden_sizes": [w - 2, v - 2], "num_stages": 2}
    pyramid: dict[str, Any] = {"num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [w, v], "image_size": 32}
    pyramid |= {"patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [3, 2]}
    resnet = {"embedding_size": 8, "hidden_sizes": [16, 24 + 8 * s.number], "depths": [2, 2]}
    attended = {"num_attention_heads": heads, "sr_ratios": [2, 1]}
    cvt: dict[str, Any] = {"embed_dim": [w, v], "num_heads": heads, "depth": [2, 2], "cls_token": [False, True]}
    cvt |= {"patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "mlp_ratio": [3.0, 2.0]}
    cvt |= {"kernel_qkv": [3, 3]} | {"padding_kv": [1, 1], "stride_q": [1, 1], "padding_q": [1, 1]}
    cvt |= {"stride_kv": [2, 2], "qkv_bias": [True, True], "qkv_projection_method": ["dw_bn", "dw_bn"]}
    cvt |= {"attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0]}
    efficient: dict[str, Any] = {
        "in_channels": [32, 480],
        "out_channels": [480, 640],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
    }
    efficient |= {"num_block_repeats": [2, 2], "expand_ratios": [1, 3], "width_coefficient": 0.025, "hidden_dim": 32}
    hgnet: dict[str, Any] = {
        "depths": [2, 2],
        "hidden_sizes": [24, 32],
        "stem_channels": [3, 8, 12],
        "stage_in_channels": [12, 24],
    }
    hgnet |= {"stage_mid_channels": [8, 12], "stage_out_channels": [24, 32], "stage_num_blocks": [1, 2]}
    hgnet |= {"stage_downsample": [False, True], "stage_downsample_strides": [2, 2], "stage_numb_of_layers": [3, 3]}
    hgnet |= {"stage_light_block": [False, True], "stage_kernel_size": [3, 5]}
    hiera: dict[str, Any] = {
        "embed_dim": 12,
        "image_size": [32, 32],
        "depths": [2, 2],
        "num_heads": [2, 4],
        "num_query_pool": 1,
    }
    hiera |= {"masked_unit_size": [4, 4], "masked_unit_attention": [True, False]}
    kernels = [[[3, 3], [3, 3]], [[3, 3], [1, 3]], [[3, 1], [3, 3]], [[3, 3], [1, 3]]]
    textnet: dict[str, Any] = {
        "conv_layer_kernel_sizes": kernels,
        "conv_layer_strides": [[1, 2], [2, 1], [2, 1], [1, 1]],
    }
    textnet |= {"image_size": 32, "hidden_sizes": [8, 8, 12, 16, 20], "stem_out_channels": 8}
    levit = {
        "image_size": 128,  # with 64, the last stage has one token, which attends to itself
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32 + 4 * s.number],
        "num_attention_heads": [2, 3, 4],
    }
    mobile = {"image_size": 128, "patch_size": 2}
    return {
        "bit": {"embedding_size": 8, "hidden_sizes": [32, 48], "depths": [2, 2], "num_groups": 4},
        "convnext": convnext,
        "convnextv2": convnext,
        "cvt": cvt | {"image_size": 32},
        "donut-swin": swin,
        "efficientnet": efficient | {"depth_coefficient": 1.0, "depth_divisor": 4, "image_size": 32},
        "focalnet": stages
        | {"embed_dim": w, "hidden_sizes": [2 * w, 2 * w], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        "hgnet_v2": hgnet | {"image_size": 32},
        "hiera": hiera,
        "levit": levit | {"key_dim": [4, 4, 4], "depths": [2, 2, 2]},
        "mobilenet_v1": {"depth_multiplier": 0.1 + 0.03 * s.number, "image_size": 32},
        "mobilenet_v2": {
            "depth_multiplier": 0.1 + 0.03 * s.number,
            "image_size": 32,
            "min_depth": 4,
            "depth_divisible_by": 4,
        },
        "mobilevit": mobile
        | {"hidden_sizes": [24, 28, 32], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 40], "num_attention_heads": 4},
        "mobilevitv2": mobile | {"width_multiplier": 0.25 + 0.125 * s.number, "n_attn_blocks": [2, 2, 2]},
        "poolformer": pyramid | {"padding": [2, 1]},
        "pp_lcnet": {"scale": 0.25, "class_expand": v},
        "pvt": pyramid | {"num_attention_heads": heads, "sequence_reduction_ratios": [4, 1]},
        "pvt_v2": pyramid | attended,
        "regnet": resnet | {"groups_width": 8},
        "resnet": resnet | ({"layer_type": "basic"} if s.biases else {}),
        "segformer": pyramid | attended,
        "shieldgemma2": {"yes_token_index": 5, "no_token_index": 7},
        "swiftformer": {"image_size": 64, "embed_dims": [8, 12, w, v], "depths": [2, 2, 2, 2]},
        "swin": swin,
        "swinv2": swin | {"pretrained_window_sizes": [0, 0]},
        "textnet": textnet,
    }
