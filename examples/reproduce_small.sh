#!/usr/bin/env bash
# All steps of docs/reproduce.md at a very small size: generated data in VG150's layout, a detector, DETR, the four
# studies of the paper, and the report. The figures mean nothing. Run it in the root of the project:
#     examples/reproduce_small.sh FOLDER
# SEEDS and STUDIES choose a part, as in: SEEDS=1 STUDIES="table1 sgtr" examples/reproduce_small.sh FOLDER
set -euo pipefail
out=$1
seeds=${SEEDS:-2}
studies=${STUDIES:-table1 table2 motifs sgtr}
read -ra sgalign <<<"${SGALIGN:-sgalign}"
mkdir -p "$out"
exec > >(tee -a "$out/log.txt") 2>&1

step() {
    echo
    echo "== $1"
    shift
    echo "+ $*"
    "$@"
}

# The options that make everything small. The published sizes are in the configs.
data=(data.root="$out/VG" data.batch_size=4 data.num_workers=0)
trainer=(trainer.max_steps=6 trainer.accelerator=cpu trainer.enable_progress_bar=false trainer.log_every_n_steps=1)
images=(model.backbone=resnet18 model.min_size=64 model.max_size=96 model.head_dim=32)
motifs=("${images[@]}" model.embed_dim=16 model.hidden_dim=16 model.relation_dim=32 model.detections_per_image=8
    model.relations_per_image=16 model.warmup_steps=2 model.learning_rate=0.002)
detr=(model.backbone=resnet10 model.stride=16 model.dim=32 model.heads=4 model.ffn_dim=32 model.entity_layers=2
    model.entity_queries=12 "model.short_sides=[48,64]" model.long_side=96 model.warmup_steps=2)
sgtr=("${detr[@]}" model.encoder_layers=1 model.layers=2 model.queries=12 trainer.devices=1 trainer.strategy=auto)

dashes() { printf -- '--%s\n' "$@"; }
mapfile -t fit < <(dashes "${data[@]}" "${trainer[@]}")
last=(--trainer.logger false --trainer.callbacks ModelCheckpoint --trainer.callbacks.filename last)

[[ -d $out/VG ]] ||
    step "Generated scenes in the layout of VG150" "${sgalign[@]}" make-dataset "$out/VG" --sizes 12 6 6
step "The data is checked" "${sgalign[@]}" check "$out/VG"

of_motifs=()
for study in $studies; do
    [[ $study == sgtr ]] || of_motifs+=("configs/studies/$study.yaml")
done
if ((${#of_motifs[@]})); then
    mapfile -t sizes < <(dashes "${images[@]}")
    [[ -f $out/detector/last.ckpt ]] ||
        step "The detector of Motifs, Faster R-CNN" "${sgalign[@]}" fit --config configs/faster_rcnn.yaml \
            --model.weights null "${sizes[@]}" "${fit[@]}" "${last[@]}" --trainer.callbacks.dirpath "$out/detector" \
            --trainer.default_root_dir "$out/detector"
    step "The studies of Motifs" "${sgalign[@]}" ablate "${of_motifs[@]}" --out "$out/studies" --seeds "$seeds" --jobs 2 \
        --set "${data[@]}" "${trainer[@]}" "${motifs[@]}" model.detector_weights="$out/detector/last.ckpt"
fi
if [[ " $studies " == *" sgtr "* ]]; then
    mapfile -t sizes < <(dashes "${detr[@]}")
    [[ -f $out/detr/last.ckpt ]] ||
        step "The detector of SGTR, DETR" "${sgalign[@]}" fit --config configs/detr.yaml "${sizes[@]}" "${fit[@]}" \
            --model.detector_weights null --model.frozen "[]" "${last[@]}" --trainer.callbacks.dirpath "$out/detr" \
            --trainer.default_root_dir "$out/detr"
    step "The study of SGTR" "${sgalign[@]}" ablate configs/studies/sgtr.yaml --out "$out/studies" --seeds "$seeds" --jobs 2 \
        --set "${data[@]}" "${trainer[@]}" "${sgtr[@]}" model.detector_weights="$out/detr/last.ckpt"
fi
step "The report" "${sgalign[@]}" report "$out/studies"
