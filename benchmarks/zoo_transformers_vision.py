"""Transformers architectures for images: convolutional networks, dense prediction, detectors, documents."""

from zoo_transformers_inputs import classes_and_tasks, features, images, one_film, with_more, with_text
from zoo_transformers_parts import DINO, LARGE_KERNELS, LCNET, NARROW, NARROW_VIT, RESNET, Row, inner

_CONV_NETS = [
    Row("CvtConfig", "CvtModel CvtForImageClassification", images(), depth=None),
    Row("EfficientNetConfig", "EfficientNetModel EfficientNetForImageClassification", images(), depth=None),
    Row("HGNetV2Config", "HGNetV2Backbone HGNetV2ForImageClassification", images(), depth=None),
    Row(
        "LevitConfig",
        "LevitModel LevitForImageClassification LevitForImageClassificationWithTeacher",
        images(),
        depth=None,
    ),
    Row("MobileNetV1Config", "MobileNetV1Model MobileNetV1ForImageClassification", images(), depth=None),
    Row(
        "MobileNetV2Config",
        "MobileNetV2Model MobileNetV2ForImageClassification MobileNetV2ForSemanticSegmentation",
        images(),
        depth=None,
    ),
    Row(
        "MobileViTConfig",
        "MobileViTModel MobileViTForImageClassification MobileViTForSemanticSegmentation",
        images(),
        depth=None,
    ),
    Row(
        "MobileViTV2Config",
        "MobileViTV2Model MobileViTV2ForImageClassification MobileViTV2ForSemanticSegmentation",
        images(),
        depth=None,
    ),
    Row("PPLCNetConfig", "PPLCNetBackbone PPLCNetForImageClassification", images(), depth=None),
    Row("PPLCNetV3Config", "PPLCNetV3Backbone", images(), depth=None),
    Row("PPLCNetV4Config", "PPLCNetV4Backbone", images(), depth=None),
    Row("RegNetConfig", "RegNetModel RegNetForImageClassification", images(), depth=None),
    Row("ResNetConfig", "ResNetModel ResNetBackbone ResNetForImageClassification", images(), depth=None),
    Row("RTDetrResNetConfig", "RTDetrResNetBackbone", images(), depth=None),
    Row("SwiftFormerConfig", "SwiftFormerModel SwiftFormerForImageClassification", images(), depth=None),
    Row("TextNetConfig", "TextNetModel TextNetBackbone TextNetForImageClassification", images(), depth=None),
    Row("TimmBackboneConfig", "TimmBackbone", images(), {"backbone": "resnet18"}, depth=None),
    Row(
        "TimmBackboneConfig",
        "TimmBackbone",
        images(),
        {"backbone": "resnet18", "freeze_batch_norm_2d": True},
        variant="frozen",
        depth=None,
    ),
    Row("TimmWrapperConfig", "TimmWrapperModel TimmWrapperForImageClassification", images(), depth=None),
    Row(
        "UVDocConfig",
        "UVDocModel",
        images(),
        {"backbone_config": inner("uvdoc_backbone", out_features=[f"stage{i}" for i in range(1, 7)])},
        depth=None,
    ),
    Row("UVDocBackboneConfig", "UVDocBackbone", images(), depth=None),
]

_DENSE_PREDICTION = [
    Row(
        "BeitConfig",
        "BeitForSemanticSegmentation",
        images(),
        {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4} | NARROW,
        depth=None,
    ),
    Row("Data2VecVisionConfig", "Data2VecVisionForSemanticSegmentation", images(), NARROW, depth=None),
    Row(
        "DepthProConfig",
        "DepthProForDepthEstimation",
        images(256),
        {
            "use_batch_norm_in_fusion_residual": True,
            "patch_size": 64,
            "fusion_hidden_size": 32,
            "intermediate_feature_dims": [32, 32],
            "scaled_images_feature_dims": [32, 32, 32],
            "intermediate_hook_ids": [1, 0],
            "image_model_config": DINO,
            "patch_model_config": DINO,
            "fov_model_config": DINO,
        },
        depth=None,
    ),
    Row(
        "DPTConfig",
        "DPTForSemanticSegmentation DPTForDepthEstimation",
        images(),
        {"use_batch_norm_in_fusion_residual": True, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
        depth=None,
    ),
    Row("GLPNConfig", "GLPNForDepthEstimation", images(), depth=None),
    Row("SegformerConfig", "SegformerForSemanticSegmentation", images(), depth=None),
    Row("UperNetConfig", "UperNetForSemanticSegmentation", images(), depth=None),
    Row(
        "VitMatteConfig",
        "VitMatteForImageMatting",
        images(channels=4),
        {
            "convstream_hidden_sizes": [48, 96, 192],
            "fusion_hidden_sizes": [256, 128, 64, 32],
            "backbone_config": inner(
                "vitdet",
                num_channels=4,
                hidden_size=384,
                num_attention_heads=6,
                num_hidden_layers=4,
                image_size=128,
                pretrain_image_size=128,
                window_size=4,
                window_block_indices=[0, 2],
                residual_block_indices=[1, 3],
                out_features=["stage4"],
            ),
        },
        depth=None,
    ),
    Row(
        "VitPoseConfig",
        "VitPoseForPoseEstimation",
        features((3, 256, 192), name="pixel_values"),
        {
            "use_simple_decoder": False,
            "backbone_config": inner("vitpose_backbone", num_hidden_layers=2, out_indices=[2], hidden_size=192),
        },
        depth=None,
    ),
    Row(
        "ZoeDepthConfig",
        "ZoeDepthForDepthEstimation",
        images(),
        {
            "use_batch_norm_in_fusion_residual": True,
            "backbone_config": inner(
                "beit",
                image_size=128,
                num_hidden_layers=4,
                use_relative_position_bias=True,
                reshape_hidden_states=False,
                out_features=[f"stage{i}" for i in range(1, 5)],
                **NARROW,
            ),
            "backbone_hidden_size": 192,
        },
        depth=None,
    ),
]

_DETECTORS = [
    Row("DetrConfig", "DetrModel DetrForObjectDetection DetrForSegmentation", images()),
    Row("ConditionalDetrConfig", "ConditionalDetrModel ConditionalDetrForObjectDetection", images()),
    Row("DabDetrConfig", "DabDetrModel DabDetrForObjectDetection", images()),
    Row("DeformableDetrConfig", "DeformableDetrModel DeformableDetrForObjectDetection", images()),
    Row("TableTransformerConfig", "TableTransformerModel TableTransformerForObjectDetection", images()),
    Row("RTDetrConfig", "RTDetrModel RTDetrForObjectDetection", images()),
    Row("RTDetrV2Config", "RTDetrV2Model RTDetrV2ForObjectDetection", images()),
    Row("DFineConfig", "DFineModel DFineForObjectDetection", images()),
    Row("Deimv2Config", "Deimv2Model Deimv2ForObjectDetection", images()),
    Row(
        "LwDetrConfig",
        "LwDetrModel LwDetrForObjectDetection",
        images(256),
        {
            "projector_scale_factors": [0.5, 2.0],
            "num_queries": 20,
            "backbone_config": inner(
                "lw_detr_vit",
                image_size=256,
                window_block_indices=[0, 1],
                out_indices=[2, 4],
                num_hidden_layers=4,
                **NARROW_VIT,
            ),
        },
        depth=None,
    ),
    Row(
        "PPDocLayoutV2Config",
        "PPDocLayoutV2ForObjectDetection",
        images(),
        {"class_thresholds": [0.5, 0.5], "class_order": [1, 2]},
    ),
    Row("PPDocLayoutV3Config", "PPDocLayoutV3Model PPDocLayoutV3ForObjectDetection", images()),
    Row("PPDocLayoutV4Config", "PPDocLayoutV4Model PPDocLayoutV4ForObjectDetection", images()),
    Row(
        "GroundingDinoConfig",
        "GroundingDinoModel GroundingDinoForObjectDetection",
        with_text(images()),
        {"backbone_config": RESNET},
    ),
    Row(
        "MMGroundingDinoConfig",
        "MMGroundingDinoModel MMGroundingDinoForObjectDetection",
        with_text(images()),
        {"backbone_config": RESNET},
    ),
    Row(
        "OmDetTurboConfig", "OmDetTurboForObjectDetection", with_more(images(), classes_and_tasks), {"num_queries": 50}
    ),
    Row(
        "TvpConfig",
        "TvpModel TvpForVideoGrounding",
        one_film,
        {"num_frames": 2},
    ),
    Row("MaskFormerConfig", "MaskFormerModel MaskFormerForInstanceSegmentation", images(), {"backbone_config": RESNET}),
]

_LINE = features((3, 48, 320), name="pixel_values")
_DOCUMENTS = [
    Row("PPOCRV5MobileDetConfig", "PPOCRV5MobileDetForObjectDetection", images()),
    Row("PPOCRV5MobileRecConfig", "PPOCRV5MobileRecModel PPOCRV5MobileRecForTextRecognition", images()),
    Row(
        "PPOCRV5ServerDetConfig",
        "PPOCRV5ServerDetModel PPOCRV5ServerDetForObjectDetection",
        images(),
        LARGE_KERNELS,
    ),
    Row("PPOCRV5ServerRecConfig", "PPOCRV5ServerRecModel PPOCRV5ServerRecForTextRecognition", _LINE),
    Row(
        "PPOCRV6MediumDetConfig",
        "PPOCRV6MediumDetForObjectDetection",
        images(),
        LARGE_KERNELS | {"backbone_config": LCNET},
    ),
    Row(
        "PPOCRV6SmallDetConfig",
        "PPOCRV6SmallDetForObjectDetection",
        images(),
        {"layer_list_out_channels": [96, 96, 192, 384], "backbone_config": LCNET},
    ),
    Row("PPOCRV6SmallRecConfig", "PPOCRV6SmallRecModel PPOCRV6SmallRecForTextRecognition", _LINE),
    Row("PPOCRV6TinyRecConfig", "PPOCRV6TinyRecModel PPOCRV6TinyRecForTextRecognition", _LINE),
    Row("SLANetConfig", "SLANetForTableRecognition", images(), depth=None),
]

VISION_ROWS = (*_CONV_NETS, *_DENSE_PREDICTION, *_DETECTORS, *_DOCUMENTS)
