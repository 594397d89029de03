"""Autoencoders and vocoders of sound: 64 to 128 latents in a row, or spectra."""
# fmt: off

from __future__ import annotations

from ..specs import Normal, Part

ENTRIES = {
    "cosmos3-audio": Part(
        cls="Cosmos3AVAEAudioTokenizer",
        config=dict(sampling_rate=16, hop_size=4, input_channels=1, stereo=True, normalize_volume=True, enc_dim=4,
                    enc_num_blocks=1, enc_n_fft=8, enc_hop_length=2, enc_latent_dim=8, enc_c_mults=(1,),
                    enc_strides=(2,), vocoder_input_dim=4, dec_dim=8, dec_c_mults=(1, 2), dec_strides=(2, 2),
                    dec_out_channels=2),
        calls=dict(encode=dict(sample=Normal((1, 2, 512)), return_dict=False),
                   decode=dict(latents=Normal((1, 4, 128))))),
    "kvae-audio": Part(
        cls="AutoencoderKLKVAEAudio",
        config=dict(encoder_dim=8, encoder_rates=(2, 4), latent_dim=32, codebook_dim=8, decoder_dim=32,
                    decoder_rates=(4, 2), attn_num_heads=2),
        calls=dict(encode=dict(audio_data=Normal((1, 1, 1024)), return_dict=False),
                   decode=dict(z=Normal((1, 8, 128)), return_dict=False))),
    "longcat-audio": Part(
        cls="LongCatAudioDiTVae",
        config=dict(channels=16, c_mults=[1, 2], strides=[2, 2], latent_dim=8, encoder_latent_dim=16,
                    downsampling_ratio=4),
        calls=dict(encode=dict(sample=Normal((1, 1, 512)), sample_posterior=False, return_dict=False),
                   decode=dict(latents=Normal((1, 8, 128)), return_dict=False))),
    "ltx2-audio": Part(
        cls="AutoencoderKLLTX2Audio",
        config=dict(in_channels=2, output_channels=2, latent_channels=4, base_channels=16, ch_mult=(1, 2, 4),
                    resolution=16, num_res_blocks=1, norm_type="pixel", causality_axis="height",
                    mid_block_add_attention=False, mel_bins=16, mel_hop_length=160),
        calls=dict(encode=dict(x=Normal((1, 2, 256, 16)), return_dict=False),
                   decode=dict(z=Normal((1, 4, 64, 4)), return_dict=False))),
    "minimax-h3-audio": Part(
        cls="AutoencoderKLMiniMaxH3Audio",
        config=dict(encoder_dim=4, encoder_rates=(2, 2), latent_dim=32, latent_channels=8, num_attention_heads=2,
                    decoder_dim=16, decoder_rates=(2, 2), decoder_kernel_sizes=(4, 4), resblock_kernel_sizes=(3, 7),
                    resblock_dilation_sizes=((1, 3), (1, 3)), latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8),
        calls=dict(encode=dict(sample=Normal((1, 1, 1024)), return_dict=False),
                   decode=dict(latents=Normal((1, 8, 128)), return_dict=False))),
    "minimax-music3": Part(
        cls="MiniMaxMusic3Vocoder",
        config=dict(latent_channels=16, decoder_input_dim=16, decoder_hidden_dim=32, upsampling_ratios=(4, 2)),
        calls=dict(forward=dict(latents=Normal((1, 16, 128))))),
    "mmaudio": Part(
        cls="MMAudioVAE",
        config=dict(mel_bins=16, latent_channels=8, hidden_channels=32, n_fft=64, hop_length=16),
        calls=dict(encode=dict(audio=Normal((1, 4096)), return_dict=False),
                   decode=dict(z=Normal((1, 8, 128)), return_dict=False))),
    "mmaudio-vocoder": Part(
        cls="MMAudioVocoder",
        config=dict(num_mels=16, upsample_initial_channel=32, upsample_rates=(4, 2), upsample_kernel_sizes=(8, 4),
                    resblock_kernel_sizes=(3, 7), resblock_dilation_sizes=((1, 3), (1, 3))),
        calls=dict(forward=dict(mel=Normal((1, 16, 128)), return_dict=False))),
    "oobleck": Part(
        cls="AutoencoderOobleck",
        config=dict(encoder_hidden_size=12, decoder_channels=12, decoder_input_channels=6, audio_channels=2,
                    downsampling_ratios=[2, 4], channel_multiples=[1, 2]),
        calls=dict(encode=dict(x=Normal((1, 2, 1024)), return_dict=False),
                   decode=dict(z=Normal((1, 6, 128)), return_dict=False))),
    "same": Part(
        cls="AutoencoderSAME",
        config=dict(audio_channels=2, patch_size=4, encoder_channels=16, encoder_c_mults=(1, 2), encoder_strides=(2, 2),
                    encoder_transformer_depths=(1, 1), latent_dim=8, use_differential_attention=False, dim_heads=8,
                    ff_mult=2),
        calls=dict(encode=dict(sample=Normal((1, 2, 2048)), return_dict=False),
                   decode=dict(latents=Normal((1, 8, 128)), return_dict=False))),
}
