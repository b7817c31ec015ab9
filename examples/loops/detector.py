"""torchvision's RetinaNet with trained BatchNorm, two images per GPU: what does SyncBatchNorm give?

Run: python examples/loops/detector.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

from syncbn.compat import import_torchvision
from syncbn.study import Study

detection, ops = import_torchvision("models.detection"), import_torchvision("ops")


class BestBox(detection.RetinaNet):
    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        """An image has one object: the best box is the answer, and there is nothing to suppress."""
        scores, codes = (head_outputs[name][0] for name in ("cls_logits", "bbox_regression"))  # of the only level
        best = [divmod(int(of_image.argmax()), scores.shape[-1]) for of_image in scores]  # anchor and class
        boxes = [self.box_coder.decode_single(codes[n, [i]], anchors[n][0][[i]]) for n, (i, _) in enumerate(best)]
        return [{"boxes": box, "label": label} for box, (_, label) in zip(boxes, best, strict=True)]


def run(setting):
    digits, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, targets = list(torch.rand(len(digits), 1, 40, 40) / 2), []
    for image, digit, label in zip(images, digits, labels, strict=True):  # a digit anywhere in noise
        x, y = torch.randint(25, (2,)).tolist()
        image[0, y : y + 16, x : x + 16] += digit.view(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1) / 16
        targets.append({"boxes": torch.tensor([[x, y, x + 16.0, y + 16.0]]), "labels": label[None]})
    layers = [(nn.Conv2d(i, 32, 3, s, 1), nn.BatchNorm2d(32), nn.ReLU()) for i, s in ((1, 2), (32, 2), (32, 1))]
    backbone = nn.Sequential(*sum(layers, ()))
    backbone.out_channels = 32
    anchors = detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
    head = detection.retinanet.RetinaNetHead(32, 1, 10, norm_layer=nn.BatchNorm2d)
    sizes = {"min_size": 40, "max_size": 40, "size_divisible": 8, "image_mean": [0.5], "image_std": [0.5]}
    model = setting.normalize(BestBox(backbone, 10, anchor_generator=anchors, head=head, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), setting.config.optimizer.lr)
    for _ in range(setting.options.get("steps", 150)):
        batch = torch.randint(1200, (setting.batch_size,))
        losses = model([images[i] for i in batch], [targets[i] for i in batch])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        pairs = list(zip(model.eval()(images[1200:]), targets[1200:], strict=True))
    ious = [ops.box_iou(found["boxes"], true["boxes"]) * (found["label"] == true["labels"]) for found, true in pairs]
    return {"iou": torch.stack(ious).mean()}


if __name__ == "__main__":
    arms = {name: {"overrides": {"norm": {"name": name}}, "reference": name == "batch"} for name in ("batch", "sync")}
    base = {"gpus": 4, "per_gpu_batch_size": 2, "device": "cpu", "optimizer": {"name": "adamw", "lr": 0.001}}
    study = Study(run=run, metric={"name": "iou", "higher_is_better": True}, base=base, arms=arms, seeds=range(3))
    study.run(tempfile.mkdtemp(), progress=False)
    print(study.compare().T)
