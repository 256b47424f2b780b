#!/bin/sh
# GridPG on ImageNet: whether explanations point to the cell of their class, in grids of images of which every probe is sure.
#
#   pipelines/how_to_probe/gridpg_imagenet.sh CKPT ROOT OUT
#   pipelines/how_to_probe/gridpg_imagenet.sh CKPT ROOT OUT --parity how-to-probe
#
# CKPT is a ResNet-50's checkpoint, ROOT holds train and val, and OUT gets the store, the run and the page. The second form
# trains and evaluates as published: cells with stretched contrast, smoothed maps. 2 x 2 grids:
#   PROTOCOL=gridpg:side=2:confidence=0.95
# For a B-cos ResNet-50:
#   GRID=pipelines/how_to_probe/in1k_bcos_resnet50.yaml METHODS=bcos,gradcam,input_x_gradient
set -eu
checkpoint=$1 root=$2 out=$3
shift 3
grid=${GRID:-$(dirname "$0")/in1k_resnet50.yaml}
methods=${METHODS:-lrp,gradcam,input_x_gradient,guided_backprop}
protocol=${PROTOCOL:-gridpg:confidence=0.95}
set -- --run "$out/run" "$@"

featcache extract --backbone "$checkpoint" --dataset imagenet --root "$root" --views 10 --short-side 256 --interpolation bilinear --store "$out/in1k.zarr"
featcache train-probes --grid "$grid" --store "$out/in1k.zarr" "$@"
featcache attribute --select "best top1 per head,layers,loss" --method "$methods" --score epg,compactness,complexity --protocol "$protocol" --backbone "$checkpoint" --dataset imagenet --root "$root" "$@"
featcache compare --localisation --run "$out/run" --select "best top1 per loss"
featcache report --run "$out/run" --out "$out/report.html"
