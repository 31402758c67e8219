-- KEYS: the locks of all claims, then their fences, then their tombstones. ARGV: owner, record and ttl ms of each claim.
-- Answers for each: the token of a new grant, or {value, remaining ms} of what is there already, or an error.
local call, pcall = redis.call, redis.pcall
local count = #KEYS / 3
local seen = call('MGET', unpack(KEYS, count + 1))
local time = call('TIME')
local now, now_text = time[1] * 1000000 + time[2], time[1] .. string.sub('00000' .. time[2], -6)
local hour = now - now % 3600000000
local answers = {}
for i = 1, count do
  local lock, fence, last, token, text, answer = KEYS[i], KEYS[count + i], seen[i], now, now_text, nil
  if seen[count + i] then
    answer = redis.error_reply('WITHDRAWN claim')
  elseif last then
    last = tonumber(last)
    if not last then
      answer = redis.error_reply('BADFENCE token')
    elseif not (last < now) then
      token = last + 1
      text = string.format('%.0f', token)
      if not (token <= 9007199254740991 and token % 1 == 0) then answer = redis.error_reply('BADFENCE token') end
    end
  end
  if not answer then
    local ttl, kept = ARGV[3 * i], '90000000'
    if #ttl > 7 and ttl * 2 > 90000000 then kept = string.format('%.0f', ttl * 2) end
    -- A token that is ahead of the clock is kept until the clock has caught up.
    if token > now then kept = string.format('%.0f', kept + (token - now) / 1000) end
    local set = pcall('SET', lock, ARGV[3 * i - 2] .. text .. ':' .. ARGV[3 * i - 1], 'NX', 'PX', ttl)
    if not set then
      local value = pcall('GET', lock)
      if type(value) == 'string' then
        answer = {string.sub(value, 1, 4300), call('PTTL', lock)}
      else
        answer = redis.error_reply('WRONGTYPE lock')
      end
    elseif set.err then
      answer = set
    else
      answer = token
      if last and last - last % 3600000000 == hour and #ttl <= 7 then
        -- 25 hours, renewed by the first grant of each hour, are 24 at least; keeping what is set is cheaper.
        set = pcall('SET', fence, text, 'KEEPTTL')
      elseif last then
        set = pcall('SET', fence, text, 'PX', kept)
      else
        -- MGET shows a key of another type as none, and NX will not overwrite it.
        set = pcall('SET', fence, text, 'NX', 'PX', kept)
      end
      if not set or set.err then
        call('DEL', lock)
        answer = set or redis.error_reply('BADFENCE token')
      end
    end
  end
  answers[i] = answer
end
return answers
