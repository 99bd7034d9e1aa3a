"""The operations that core knows, by the names of ATen; what each rule says is in `operations`. Imports no torch."""

from __future__ import annotations

RULES: dict[str, str] = {
    "WEIGHTED": """
        linear conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding
        conv_transpose1d conv_transpose2d.input conv_transpose3d.input""",
    "LINEAR": """
        reshape permute transpose.int t numpy_T mT unsqueeze squeeze squeeze.dim squeeze.dims select.int slice.Tensor
        narrow flatten.using_ints unflatten.int expand expand_as movedim.int movedim.intlist swapaxes swapdims adjoint
        pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle flip roll rot90 repeat
        repeat_interleave.self_int tile reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec _upsample_nearest_exact2d.vec index.Tensor
        index_select gather unfold im2col tril triu diagonal neg positive _to_copy take_along_dim view_as
        getitem.parts""",
    "POOL": """
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d mean mean.dim sum sum.dim_IntList cumsum
        upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec upsample_bicubic2d.vec
        _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec upsample_bilinear2d upsample_bicubic2d col2im""",
    "MAXPOOL": "max_pool1d max_pool2d max_pool3d",
    "RELU": "relu",
    "RELU6": "relu6",
    "clip": "hardtanh clamp clamp_min",
    "threshold": "threshold",
    "padding": "pad constant_pad_nd",
    "ADD": "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor",
    "CAT": "cat concat concatenate stack hstack vstack slice_scatter select_scatter diagonal_scatter copy",
    "multiplication": "mul.Tensor mul.Scalar div.Tensor div.Scalar",
    "rounded_division": "div.Tensor_mode div.Scalar_mode floor_divide",
    "MATMUL": "matmul bmm mm",
    "LOOKUP": "embedding",
    "SIZE": "new_zeros new_ones new_full new_empty",
    "RECURRENT": "lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_relu.input lstm_cell gru_cell",
    "pointwise": """
        leaky_relu elu gelu silu sigmoid tanh softplus hardswish hardsigmoid mish prelu _prelu_kernel selu celu
        log_sigmoid softsign rrelu hardshrink softshrink erf exp log abs sqrt rsqrt reciprocal sin cos sign round floor
        ceil trunc nan_to_num square expm1 log1p log2 exp2 pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar clamp.Tensor
        clamp_max maximum minimum max.other min.other where.self where.ScalarOther where.ScalarSelf where.Scalar
        masked_fill.Scalar masked_fill.Tensor lerp.Scalar lerp.Tensor addcmul addcdiv atan atan2 remainder.Scalar
        fmod.Scalar logit heaviside sinh cosh frac zeros_like ones_like full_like fill.Scalar fill.Tensor index_put
        _unsafe_index_put masked_scatter scatter.src scatter.value scatter_add index_add index_copy
        index_fill.int_Scalar
        clamp_min.Tensor clamp_max.Tensor hypot
        zero""",
    "reduction": """
        softmax.int _softmax _safe_softmax log_softmax.int _log_softmax layer_norm rms_norm group_norm instance_norm
        _native_batch_norm_legit.no_stats native_layer_norm native_group_norm linalg_vector_norm norm.ScalarOpt_dim
        var.dim var.correction std.dim std.correction var_mean.dim var_mean.correction
        max.dim min.dim amax amin aminmax max min median.dim argmax argmin argsort
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        logsumexp prod prod.dim_int topk sort cumprod cosine_similarity lp_pool2d local_response_norm""",
}
"""Rule of `spikeplug.graph.operations` -> the operations it is for; the overload `default` is not written."""

CORE: dict[str, str] = {
    "spikeplug.affine": "spikeplug.graph.operations:AFFINE",
    "operator.getitem": "spikeplug.graph.operations:PART",
    **{
        f"aten.{name}" if "." in name else f"aten.{name}.default": f"spikeplug.graph.operations:{rule}"
        for rule, names in RULES.items()
        for name in names.split()
    },
}
"""What the hook `spikeplug_operations` of core gives."""
