"""Plays a program that uses pygame, without a window and on a simulated clock, and records what it draws. Runs in a
confined process, and writes record.json there.

A scenario gives `seed` of random, `frames` to play at most, `keys` (name by frame), and whether a `pilot` plays. A
frame is everything drawn between two calls of pygame.display.flip or update; a program that only waits for events
gets frames without drawing.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import game_facts

_STEP = 1000 / 60
#: calls for events without a new frame, after which a frame is taken to have passed
_LOOKS = 20
_SAMPLE_EVERY, _COLUMNS, _ROWS = 10, 12, 20
#: draws that are kept per surface and per frame
_MOST_DRAWS = 400
_KEPT = 40
_PILOT_REST = 4
Draw = dict[str, Any]


def record(scenario: Mapping[str, Any]) -> None:
    """Play program.py and write record.json. Exits the process when the frames are used up."""
    _Recorder(scenario).run()


class _Recorder:
    def __init__(self, scenario: Mapping[str, Any]) -> None:
        self.pygame: Any = importlib.import_module("pygame")
        self.n_frames: int = scenario["frames"]
        self.keys = {int(frame): name for frame, name in scenario.get("keys", {}).items()}
        self.pilot: bool = scenario.get("pilot", False)
        self.seed: int = scenario.get("seed", 0)
        self.now = 0.0  # ms
        self.timers: dict[int, tuple[Any, float, float, int]] = {}
        self.screen: Any = None
        self.logs: weakref.WeakKeyDictionary[Any, list[Draw]] = weakref.WeakKeyDictionary()
        self.frames: list[dict[str, Any]] = []
        self.presses: list[tuple[int, str]] = []
        self.down: set[int] = set()
        self.looks = 0
        self.last_press = -_PILOT_REST
        self.bird: tuple[str, game_facts.Color] | None = None

    def run(self) -> None:
        random.seed(self.seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(self.seed)
        self._patch()
        ended, error = "exit", None
        try:
            runpy.run_path("program.py", run_name="__main__")
        except SystemExit:
            pass
        except BaseException as e:
            traceback.print_exc()
            ended, error = "error", f"{type(e).__name__}: {e}"[:300]
        self._write(ended, error)

    def _write(self, ended: str, error: str | None) -> None:
        said = {
            "size": list(self.screen.get_size()) if self.screen is not None else [0, 0],
            "frames": self.frames,
            "ended": ended,
            "error": error,
            "presses": self.presses,
        }
        with open("record.json", "w", encoding="utf-8") as f:
            f.write(json.dumps(said))

    # ------------------------------------------------------------ time

    def _advance(self, ms: float) -> None:
        self.now += max(0.0, ms)
        for key, (event, due, interval, loops) in list(self.timers.items()):
            if due > self.now:
                continue
            self.pygame.event.post(event)
            if loops == 1:
                del self.timers[key]
            else:
                self.timers[key] = (event, max(due + interval, self.now), interval, loops - (loops > 0))

    def _frame(self) -> None:
        """End a frame."""
        self.looks = 0
        n = len(self.frames)
        draws = self.logs.get(self.screen, []) if self.screen is not None else []
        frame: dict[str, Any] = {"n": n, "draws": draws[-_MOST_DRAWS:]}
        if self.screen is not None:
            self.logs[self.screen] = []
            if n % _SAMPLE_EVERY == 0:
                frame["pixels"] = self._sample()
        self.frames.append(frame)
        if len(self.frames) >= self.n_frames:
            self._write("frames", None)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        self._release()
        name = self.keys.get(n + 1) or (self._fly() if self.pilot else None)
        if name is not None:
            self._press(n + 1, name)

    def _sample(self) -> list[list[list[int]]]:
        w, h = self.screen.get_size()
        xs = [int((i + 0.5) * w / _COLUMNS) for i in range(_COLUMNS)]
        ys = [int((i + 0.5) * h / _ROWS) for i in range(_ROWS - 1)] + [h - 3]
        return [[list(self.screen.get_at((x, y)))[:3] for x in xs] for y in ys]

    # ------------------------------------------------------------ keys

    def _press(self, frame: int, name: str) -> None:
        pygame = self.pygame
        key = getattr(pygame, f"K_{name}")
        self.presses.append((frame, name))
        self.down.add(key)
        text = {"SPACE": " "}.get(name, name if len(name) == 1 else "")
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key, mod=0, unicode=text, scancode=0))

    def _release(self) -> None:
        pygame = self.pygame
        for key in self.down:
            pygame.event.post(pygame.event.Event(pygame.KEYUP, key=key, mod=0, unicode="", scancode=0))
        self.down.clear()

    def _fly(self) -> str | None:
        """Return SPACE if the bird is about to be too low for the next gap."""
        n, size = len(self.frames), self.screen.get_size() if self.screen is not None else (0, 0)
        if n - self.last_press < _PILOT_REST or n < 3:
            return None
        here = self.frames[-1]
        if self.bird is None or n % _KEPT == 0:
            track = game_facts.bird(size, self.frames[-_KEPT:])
            self.bird = track and (track.op, track.color)
        track = self.bird and game_facts.track(size, self.frames[-2:], *self.bird)
        if track is None or n - 1 not in track.boxes:
            if n > 10:
                return None
            self.last_press = n
            return "SPACE"
        y = track.centre(n - 1)
        speed = y - track.centre(n - 2) if n - 2 in track.boxes else 0.0
        x, _, _, height = track.boxes[n - 1]
        aim = 0.5 * size[1]
        way = next((way for way in game_facts.ways(size, here) if way.right > x), None)
        if way is not None:
            aim = way.lower - max(0.3 * (way.lower - way.upper), height * 0.75)
        if y + 2 * speed > aim and speed > -1:
            self.last_press = n
            return "SPACE"
        return None

    # ------------------------------------------------------------ what programs call

    def _patch(self) -> None:
        self._patch_time()
        self._patch_display()
        self._patch_events()
        self._patch_drawing()

    def _patch_time(self) -> None:
        pygame, me = self.pygame, self
        began = time.time()

        class Clock:
            def __init__(self) -> None:
                self._last = me.now

            def tick(self, framerate: float = 0) -> int:
                me._advance(1000 / framerate if framerate else _STEP)
                self._took, self._last = me.now - self._last, me.now
                return round(self._took)

            tick_busy_loop = tick
            _took = _STEP

            def get_time(self) -> int:
                return round(self._took)

            get_rawtime = get_time

            def get_fps(self) -> float:
                return 1000 / max(1.0, self._took)

        def wait(ms: float) -> int:
            me._advance(ms)
            return int(ms)

        def set_timer(event: Any, millis: int = 0, loops: int = 0, **_: Any) -> None:
            made = event if isinstance(event, pygame.event.EventType) else pygame.event.Event(event)
            me.timers.pop(made.type, None)
            if millis:
                me.timers[made.type] = (made, me.now + millis, millis, int(loops))

        pygame.time.Clock, pygame.time.wait, pygame.time.delay = Clock, wait, wait
        pygame.time.get_ticks = lambda: int(me.now)
        pygame.time.set_timer = set_timer
        time.time = lambda: began + me.now / 1000
        time.monotonic = time.perf_counter = lambda: me.now / 1000
        time.sleep = lambda seconds: me._advance(1000.0 * float(seconds))

    def _patch_display(self) -> None:
        pygame, me = self.pygame, self
        set_mode = pygame.display.set_mode

        def made(size: Sequence[int] = (0, 0), *args: Any, **kwargs: Any) -> Any:
            real = set_mode(size if tuple(size) != (0, 0) else (800, 600), 0)
            me.screen = pygame.Surface(real.get_size())
            return me.screen

        def flip(*_: Any) -> None:
            me._frame()

        pygame.display.set_mode = made
        pygame.display.get_surface = lambda: me.screen
        pygame.display.flip = pygame.display.update = flip

    def _patch_events(self) -> None:
        pygame, me = self.pygame, self
        get, poll = pygame.event.get, pygame.event.poll

        def look() -> None:
            me.looks += 1
            if me.looks > _LOOKS and me.screen is not None:
                me._advance(_STEP)
                me._frame()

        def get_all(*args: Any, **kwargs: Any) -> Any:
            look()
            return get(*args, **kwargs)

        def get_one(*_: Any) -> Any:
            look()
            return poll()

        def wait(*_: Any) -> Any:
            while (event := poll()).type == pygame.NOEVENT:
                me._advance(_STEP)
                me._frame()
            return event

        def pressed() -> Any:
            class Keys:
                def __getitem__(self, key: int) -> bool:
                    return key in me.down

            return Keys()

        pygame.event.get, pygame.event.poll, pygame.event.wait = get_all, get_one, wait
        pygame.key.get_pressed = pressed

    # ------------------------------------------------------------ drawing

    def _note(self, surface: Any, draw: Draw) -> None:
        log = self.logs.setdefault(surface, [])
        log.append(draw)
        if len(log) > 2 * _MOST_DRAWS:
            del log[:_MOST_DRAWS]

    def _color(self, value: Any) -> list[int]:
        return list(self.pygame.Color(value))[:3]

    def _noted_blit(self, target: Any, source: Any, at: Any) -> None:
        x, y = (at.x, at.y) if hasattr(at, "topleft") else (at[0], at[1])
        for draw in list(self.logs.get(source, ())):
            left, top, w, h = draw["box"]
            self._note(target, {**draw, "box": [left + x, top + y, w, h]})

    def _patch_drawing(self) -> None:
        pygame, me = self.pygame, self
        base = pygame.Surface

        class Surface(base):  # type: ignore[misc, valid-type]
            def fill(self, color: Any, rect: Any = None, *args: Any, **kwargs: Any) -> Any:
                if rect is None:
                    me.logs[self] = []
                box = list(pygame.Rect(rect)) if rect is not None else [0, 0, *self.get_size()]
                value = pygame.Color(color)
                if value.a:
                    me._note(self, {"op": "rect", "color": list(value)[:3], "box": box})
                return super().fill(color, rect, *args, **kwargs)

            def blit(self, source: Any, dest: Any = (0, 0), *args: Any, **kwargs: Any) -> Any:
                me._noted_blit(self, source, dest)
                return super().blit(source, dest, *args, **kwargs)

            def blits(self, blit_sequence: Any, doreturn: Any = 1) -> Any:
                return [self.blit(*one) for one in blit_sequence]

            def copy(self) -> Any:
                return me._same(super().copy(), self)

            def convert(self, *args: Any) -> Any:
                return me._same(super().convert(*args), self)

            def convert_alpha(self, *args: Any) -> Any:
                return me._same(super().convert_alpha(*args), self)

        pygame.Surface = pygame.surface.Surface = Surface
        self._patch_shapes()
        self._patch_transforms()
        self._patch_fonts()

    def _same(self, made: Any, source: Any) -> Any:
        """Copy the drawing log of a surface's source, scaled to the surface's size; returns the surface."""
        (w, h), (mine_w, mine_h) = source.get_size(), made.get_size()
        fx, fy = mine_w / max(1, w), mine_h / max(1, h)
        self.logs[made] = [
            {**d, "box": [v * f for v, f in zip(d["box"], (fx, fy, fx, fy), strict=True)]}
            for d in self.logs.get(source, ())
        ]
        return made

    def _patch_shapes(self) -> None:
        draw, me = self.pygame.draw, self

        def wrap(name: str, box_of: Callable[..., tuple[list[float], Any]]) -> None:
            real = getattr(draw, name)

            def drawn(surface: Any, color: Any, *args: Any, **kwargs: Any) -> Any:
                done = real(surface, color, *args, **kwargs)
                box, width = box_of(*args, **kwargs)
                me._note(surface, {"op": name, "color": me._color(color), "box": box, "outline": bool(width)})
                return done

            setattr(draw, name, drawn)

        def of_rect(rect: Any, width: int = 0, *_: Any, **__: Any) -> tuple[list[float], Any]:
            return list(self.pygame.Rect(rect)), width

        def of_circle(center: Any, radius: float, width: int = 0, *_: Any, **__: Any) -> tuple[list[float], Any]:
            return [center[0] - radius, center[1] - radius, 2 * radius, 2 * radius], width

        def of_points(points: Any, width: int = 0, *_: Any, **__: Any) -> tuple[list[float], Any]:
            xs, ys = zip(*((p[0], p[1]) for p in points), strict=True)
            return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], width

        for name, how in (("rect", of_rect), ("ellipse", of_rect), ("circle", of_circle), ("polygon", of_points)):
            wrap(name, how)

    def _patch_transforms(self) -> None:
        transform, me = self.pygame.transform, self
        for name in ("rotate", "rotozoom", "scale", "smoothscale", "scale_by", "flip"):
            real = getattr(transform, name, None)
            if real is None:
                continue

            def changed(surface: Any, *args: Any, _real: Any = real, **kwargs: Any) -> Any:
                return me._same(_real(surface, *args, **kwargs), surface)

            setattr(transform, name, changed)

    def _patch_fonts(self) -> None:
        pygame, me = self.pygame, self
        base = pygame.font.Font

        class Font(base):  # type: ignore[misc, valid-type]
            def render(self, text: Any, antialias: Any = True, color: Any = (0, 0, 0), *args: Any) -> Any:
                drawn = super().render(text, antialias, color, *args)
                said = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
                entry = {"op": "text", "color": me._color(color), "box": [0, 0, *drawn.get_size()], "text": said[:200]}
                me.logs[drawn] = [entry]
                return drawn

        made: dict[int, Any] = {}

        def system(name: Any = None, size: int = 20, *_: Any, **__: Any) -> Any:
            if int(size) not in made:  # programs ask for one in every frame
                made[int(size)] = Font(None, int(size))
            return made[int(size)]

        pygame.font.Font, pygame.font.SysFont = Font, system
        pygame.font.get_fonts = list
        pygame.font.match_font = lambda *_, **__: None
