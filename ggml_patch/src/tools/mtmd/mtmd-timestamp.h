#pragma once

#include "clip-impl.h"

#include <map>
#include <string>
#include <vector>

// !!! Internal header, to be used by mtmd only !!!

#define MTMD_INTERNAL_HEADER

// The time that ERNIE-4.5-VL was trained to read in each frame of a video: black with a white outline, in the upper left
// corner, as high as a tenth of the frame's shorter side. One drawer serves the frames of a video.
struct mtmd_timestamp_drawer {
    // "time: 00:01:02.50"
    static std::string text(double seconds);

    // frames that are less than 10 pixels wide or high have no room
    void draw(clip_image_u8 & frame, const std::string & text);

  private:
    // coverage of the pixels of a rectangle, 0 to 255
    struct mask {
        int                  x      = 0;
        int                  y      = 0;
        int                  width  = 0;
        int                  height = 0;
        std::vector<uint8_t> coverage;

        mask() = default;
        mask(int x, int y, int width, int height)
            : x(x), y(y), width(width), height(height), coverage((size_t) width * height) {}

        void add(const mask & other, int offset);  // the larger of both, `other` moved to the right
        void blend(clip_image_u8 & frame, uint8_t ink) const;
    };
    struct glyph_masks {
        float advance = 0;  // pixels
        mask  fill;
        mask  outline;
    };

    int                         size = 0;  // of the font in pixels
    std::map<char, glyph_masks> masks;

    const glyph_masks & get(char c);
};
