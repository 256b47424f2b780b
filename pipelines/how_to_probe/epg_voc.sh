#!/bin/sh
# EPG on VOC2007: how much of each probe's explanations lies in the boxes of the class explained.
#
#   pipelines/how_to_probe/epg_voc.sh CKPT ROOT OUT
#   pipelines/how_to_probe/epg_voc.sh CKPT ROOT OUT --parity how-to-probe
#
# CKPT is a ResNet-50's checkpoint, ROOT holds VOCdevkit, and OUT gets the store, the run and the page. The second form
# trains and evaluates as published: 1,001 images, CLIP's statistics, smoothed maps. For a B-cos ResNet-50:
#   GRID=pipelines/how_to_probe/voc07_bcos_resnet50.yaml METHODS=bcos,gradcam,input_x_gradient,intgrad
set -eu
checkpoint=$1 root=$2 out=$3
shift 3
grid=${GRID:-$(dirname "$0")/voc07_resnet50.yaml}
methods=${METHODS:-lrp,gradcam,input_x_gradient,guided_backprop,intgrad}
set -- --run "$out/run" "$@"

featcache extract --backbone "$checkpoint" --dataset voc --root "$root" --views 10 --interpolation opencv_bilinear --store "$out/voc07.zarr"
featcache train-probes --grid "$grid" --store "$out/voc07.zarr" "$@"
featcache attribute --select "best map per head,layers" --method "$methods" --score epg,box_iou --backbone "$checkpoint" --dataset voc --root "$root" "$@"
featcache report --run "$out/run" --out "$out/report.html"
